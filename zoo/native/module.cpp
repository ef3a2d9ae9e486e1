// dimmix._native: mixing layers on x86-64, where AVX2 or AVX-512 is. Python calls it with addresses; layers/native.py
// and native_stage.py are the only callers and have checked shapes, types and strides.

#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

// One level over groups * inner * stride features; see ButterflySchedule. With `hidden`, each block is an MLP.
struct Level {
    long groups, stride, inner, outer, hidden, residual, activate;
    const float *weight, *bias, *weight2, *bias2;
};

// Images (channels, height, width) whose square patches are the rows of a Mix: `side` pixels a side, `stride` apart. With
// side 0 its rows are rows. The result is images too, and x is added to it.
struct Patches {
    long channels, height, width, side, stride;
};

// With `gamma` a LayerNorm over the features of x comes first; `plus` has the strides of y, and is added at the end.
struct Mix {
    const float *x, *plus, *gamma, *beta;
    float *y, epsilon;
    long x_feature, x_row, y_feature, y_row;  // strides in floats
    long rows, in, out, widest, packed, hidden;  // features of x, of y; most of them in a tile, a block, a block's MLP
    long count;
    const Level *levels;
    Patches patches;
};

// q, k and v are (tokens, pitch), their first heads * head_dim columns; out is (tokens, heads * head_dim).
struct Attend {
    const float *q, *k, *v;
    float *out;
    long tokens, radix, stride, heads, head_dim, pitch;
    float scale;
};

// How far the pixels lie that a weight meets, and which of them are beside the row: 0 there, else -1.
struct Tap {
    long offset;
    const int *mask;
};

// A grouped convolution, `width` channels in a group of its input, and the BatchNorm after it, if `gamma` is there.
// The weights of a channel lie tap by tap if `taps_first`, else channel by channel.
struct Convolution {
    long out, width, groups, taps_first, kernel;
    const float *weight, *bias, *gamma, *beta, *mean, *variance;
    float epsilon;
    Tap taps[9];  // these and the next are filled in by the kernels
    const int *planes, *places;
    const float *scale, *shift;
};

// A residual block: first and second 3x3, shortcut 1x1 or, without weight, nothing; stride 1 or 2. Without a second one
// it is the first and its ReLU alone. The turns are the permutations of channels before the first and (backwards) after
// the last, and between the two, each a transpose of (outer, middle, inner).
struct Block {
    long stride, turn[3], turn_middle[3];
    Convolution first, second, shortcut;
};

// x has strides in floats; y is (images, rows, columns, channels), contiguous.
struct Stage {
    const float *x;
    float *y;
    long x_image, x_channel, x_row, x_column;
    long images, channels, height, width, count;
    Block *blocks;
};

// Memory of a thread's own, kept from call to call.
class Scratch {
    float *memory = nullptr;
    long floats = 0;

  public:
    float *get(long wanted) {
        if (wanted > floats) {
            free(memory);
            floats = posix_memalign((void **)&memory, 64, 4 * wanted) ? 0 : wanted;
            if (!floats) memory = nullptr;
        }
        return memory;
    }
    ~Scratch() { free(memory); }
};

static thread_local Scratch scratch, plans;

// What an instruction set has.
struct Kernels {
    const char *name;
    long tile;  // rows
    long (*mix_memory)(const Mix &);
    void (*mix)(const Mix &, long tile, float *memory);
    long (*attend_memory)(const Attend &);
    void (*attend)(const Attend &, long task, float *memory);
    long (*stage_plan_memory)(const Stage &);
    void (*stage_plan)(const Stage &, float *memory);  // before the next two, once for all images
    long (*stage_memory)(const Stage &);
    void (*stage)(const Stage &, long image, float *memory);
    void (*stage_together)(const Stage &, long image, float *memory);
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LANES 8
#define BLOCK 4  // rows of a product in registers, of which there are 16
#define MINIMUM _mm256_min_ps
#define MAXIMUM _mm256_max_ps
#define SQUARE_ROOT _mm256_sqrt_ps
#include "kernels.h"
#undef LANES
#undef BLOCK
#undef MINIMUM
#undef MAXIMUM
#undef SQUARE_ROOT
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq")
namespace avx512 {
#define LANES 16
#define BLOCK 8  // of 32 registers
#define MINIMUM _mm512_min_ps
#define MAXIMUM _mm512_max_ps
#define SQUARE_ROOT _mm512_sqrt_ps
#include "kernels.h"
#undef LANES
#undef BLOCK
#undef MINIMUM
#undef MAXIMUM
#undef SQUARE_ROOT
}  // namespace avx512
#pragma GCC pop_options

static const Kernels *find(const char *name) {
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (wide && (!*name || !strcmp(name, "avx512"))) return &avx512::kernels;
    const bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return narrow && (!*name || !strcmp(name, "avx2")) ? &avx2::kernels : nullptr;
}
#else
static const Kernels *find(const char *) { return nullptr; }
#endif

static const Kernels *kernels = find("");

// Runs tasks on the threads of the OpenMP that torch has loaded; false where a thread had no memory.
template <class Work>
static bool run(long tasks, long floats, const Work &work) {
    bool enough = true;
#pragma omp parallel for schedule(static) if (tasks > 1)
    for (long task = 0; task < tasks; task++) {
        float *memory = scratch.get(floats);
        if (memory)
            work(task, memory);
        else
            enough = false;
    }
    return enough;
}

static PyObject *answer(bool enough) {
    if (!enough) return PyErr_NoMemory();
    Py_INCREF(Py_None);
    return Py_None;
}

const int most_levels = 32;

// The levels of a Mix from Python's lists, of each the 7 numbers and the 4 addresses of `Level`, and what follows from
// them; false with an error of Python's where they make no sense.
static bool read_levels(PyObject *shapes, PyObject *pointers, Level *levels, Mix &m) {
    const int numbers = 7, addresses = 4;
    m.count = PyList_Size(shapes) / numbers;
    if (!kernels || m.count < 1 || m.count > most_levels || PyList_Size(pointers) != m.count * addresses) {
        PyErr_SetString(PyExc_ValueError, "mix: no kernels here, or not 1 to 32 levels");
        return false;
    }
    for (long i = 0; i < m.count; i++) {
        for (int k = 0; k < numbers; k++)
            (&levels[i].groups)[k] = PyLong_AsLong(PyList_GetItem(shapes, i * numbers + k));
        for (int k = 0; k < addresses; k++)
            (&levels[i].weight)[k] = (const float *)PyLong_AsVoidPtr(PyList_GetItem(pointers, i * addresses + k));
    }
    if (PyErr_Occurred()) return false;
    for (long i = 1; i < m.count; i++)
        if (levels[i].groups * levels[i].stride * levels[i].inner !=
            levels[i - 1].groups * levels[i - 1].stride * levels[i - 1].outer) {
            PyErr_SetString(PyExc_ValueError, "mix: a level takes other features than it is given");
            return false;
        }
    const auto raise_to = [](long &most, long value) { most = value > most ? value : most; };
    for (long i = 0; i < m.count; i++) {
        const Level &l = levels[i];
        raise_to(m.packed, l.inner);
        raise_to(m.hidden, l.hidden);
        raise_to(m.widest, l.groups * l.stride * (l.inner > l.outer ? l.inner : l.outer));
    }
    m.in = levels[0].groups * levels[0].stride * levels[0].inner;
    m.out = levels[m.count - 1].groups * levels[m.count - 1].stride * levels[m.count - 1].outer;
    m.levels = levels;
    return true;
}

static PyObject *run_mix(const Mix &m) {
    bool enough;
    Py_BEGIN_ALLOW_THREADS;
    enough = run((m.rows + kernels->tile - 1) / kernels->tile, kernels->mix_memory(m), [&](long tile, float *memory) {
        kernels->mix(m, tile, memory);
    });
    Py_END_ALLOW_THREADS;
    return answer(enough);
}

// mix(x, x_feature, x_row, y, y_feature, y_row, rows, shapes, pointers, gamma, beta, epsilon, plus): shapes and pointers
// as `read_levels` takes them; the last addresses may be 0.
static PyObject *py_mix(PyObject *, PyObject *args) {
    Mix m = {};
    Level levels[most_levels];
    unsigned long long x, y, gamma, beta, plus;
    PyObject *shapes, *pointers;
    if (!PyArg_ParseTuple(
            args, "KllKlllO!O!KKfK", &x, &m.x_feature, &m.x_row, &y, &m.y_feature, &m.y_row, &m.rows, &PyList_Type,
            &shapes, &PyList_Type, &pointers, &gamma, &beta, &m.epsilon, &plus) ||
        !read_levels(shapes, pointers, levels, m))
        return nullptr;
    m.x = (const float *)x, m.y = (float *)y;
    m.gamma = (const float *)gamma, m.beta = (const float *)beta, m.plus = (const float *)plus;
    return run_mix(m);
}

// mix_patches(x, y, images, channels, height, width, side, stride, shapes, pointers, gamma, beta, epsilon): x and y are
// contiguous, the rest as for `mix`.
static PyObject *py_mix_patches(PyObject *, PyObject *args) {
    Mix m = {};
    Level levels[most_levels];
    unsigned long long x, y, gamma, beta;
    long images;
    Patches &p = m.patches;
    PyObject *shapes, *pointers;
    if (!PyArg_ParseTuple(
            args, "KKllllllO!O!KKf", &x, &y, &images, &p.channels, &p.height, &p.width, &p.side, &p.stride,
            &PyList_Type, &shapes, &PyList_Type, &pointers, &gamma, &beta, &m.epsilon) ||
        !read_levels(shapes, pointers, levels, m))
        return nullptr;
    const long span = p.side * p.stride;
    if (span < 1 || p.height % span || p.width % span || m.in != p.channels * p.side * p.side || m.out != m.in) {
        PyErr_SetString(PyExc_ValueError, "mix_patches: patches that do not fit the image or the levels");
        return nullptr;
    }
    m.rows = images * (p.height / p.side) * (p.width / p.side);
    m.x = (const float *)x, m.y = (float *)y;
    m.gamma = (const float *)gamma, m.beta = (const float *)beta;
    return run_mix(m);
}

// attend(q, k, v, out, tokens, radix, stride, heads, head_dim, pitch)
static PyObject *py_attend(PyObject *, PyObject *args) {
    Attend a = {};
    unsigned long long q, k, v, out;
    if (!PyArg_ParseTuple(
            args, "KKKKllllll", &q, &k, &v, &out, &a.tokens, &a.radix, &a.stride, &a.heads, &a.head_dim, &a.pitch))
        return nullptr;
    if (!kernels) {
        PyErr_SetString(PyExc_ValueError, "attend: no kernels here");
        return nullptr;
    }
    a.q = (const float *)q, a.k = (const float *)k, a.v = (const float *)v, a.out = (float *)out;
    a.scale = 1 / sqrtf((float)a.head_dim);
    bool enough;
    Py_BEGIN_ALLOW_THREADS;
    enough = run(a.tokens / a.radix * a.heads, kernels->attend_memory(a), [&](long task, float *memory) {
        kernels->attend(a, task, memory);
    });
    Py_END_ALLOW_THREADS;
    return answer(enough);
}

// Whether each convolution takes the channels that it is given, and what is added has as many.
static bool fits(long channels, const Block *blocks, long count) {
    const auto takes = [](const Convolution &c, long given) { return c.groups * c.width == given; };
    for (long i = 0; i < count; i++) {
        const Block &b = blocks[i];
        if (!takes(b.first, channels)) return false;
        if (!b.second.weight) {
            channels = b.first.out;
            continue;
        }
        const bool same = b.shortcut.weight ? takes(b.shortcut, channels) && b.shortcut.out == b.second.out
                                            : b.stride == 1 && b.second.out == channels;
        if (!same || !takes(b.second, b.first.out)) return false;
        channels = b.second.out;
    }
    return true;
}

// stage(x, strides of x (4), y, images, channels, height, width, threads, shapes, pointers, epsilons): of each block 19
// numbers (stride, both turns, of each convolution out, width, groups, taps_first), 18 addresses and 3 epsilons.
static PyObject *py_stage(PyObject *, PyObject *args) {
    const int most = 16, numbers = 19, addresses = 18;
    Stage s = {};
    unsigned long long x, y;
    long threads;
    PyObject *shapes, *pointers, *epsilons;
    if (!PyArg_ParseTuple(
            args, "KllllKlllllO!O!O!", &x, &s.x_image, &s.x_channel, &s.x_row, &s.x_column, &y, &s.images, &s.channels,
            &s.height, &s.width, &threads, &PyList_Type, &shapes, &PyList_Type, &pointers, &PyList_Type, &epsilons))
        return nullptr;
    s.count = PyList_Size(shapes) / numbers;
    if (!kernels || s.count < 1 || s.count > most || PyList_Size(pointers) != s.count * addresses ||
        PyList_Size(epsilons) != s.count * 3) {
        PyErr_SetString(PyExc_ValueError, "stage: no kernels here, or not 1 to 16 blocks");
        return nullptr;
    }
    Block blocks[most];
    for (long i = 0; i < s.count; i++) {
        long number[numbers];
        for (int k = 0; k < numbers; k++) number[k] = PyLong_AsLong(PyList_GetItem(shapes, i * numbers + k));
        Block &b = blocks[i];
        b.stride = number[0];
        memcpy(b.turn, number + 1, sizeof b.turn);
        memcpy(b.turn_middle, number + 4, sizeof b.turn_middle);
        Convolution *convolutions[] = {&b.first, &b.second, &b.shortcut};
        for (int c = 0; c < 3; c++) {
            Convolution &to = *convolutions[c];
            memcpy(&to.out, number + 7 + 4 * c, 4 * sizeof(long));
            to.kernel = c < 2 ? 3 : 1;
            to.epsilon = (float)PyFloat_AsDouble(PyList_GetItem(epsilons, 3 * i + c));
            for (int k = 0; k < 6; k++)
                (&to.weight)[k] =
                    (const float *)PyLong_AsVoidPtr(PyList_GetItem(pointers, i * addresses + 6 * c + k));
        }
    }
    if (PyErr_Occurred()) return nullptr;
    if (!fits(s.channels, blocks, s.count)) {
        PyErr_SetString(PyExc_ValueError, "stage: a convolution takes other channels than it is given");
        return nullptr;
    }
    s.x = (const float *)x, s.y = (float *)y, s.blocks = blocks;
    bool enough;
    Py_BEGIN_ALLOW_THREADS;
    const long memory = kernels->stage_memory(s);
    float *plan = plans.get(kernels->stage_plan_memory(s));
    if (plan) kernels->stage_plan(s, plan);
    if (!plan) {
        enough = false;
    } else if (s.images < threads) {
        float *buffers = scratch.get(memory);
        for (long image = 0; buffers && image < s.images; image++) kernels->stage_together(s, image, buffers);
        enough = buffers;
    } else {
        enough = run(s.images, memory, [&](long image, float *buffers) { kernels->stage(s, image, buffers); });
    }
    Py_END_ALLOW_THREADS;
    return answer(enough);
}

// use(name): the kernels for an instruction set, "" for the widest; returns its name, "" where there is none.
static PyObject *py_use(PyObject *, PyObject *args) {
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
    const Kernels *found = find(name);
    if (found) kernels = found;
    return PyUnicode_FromString(found ? found->name : "");
}

static PyMethodDef methods[] = {
    {"mix", py_mix, METH_VARARGS, "The levels of a butterfly over the features of rows."},
    {"mix_patches", py_mix_patches, METH_VARARGS, "The same over the values of an image's patches, added to the image."},
    {"attend", py_attend, METH_VARARGS, "Attention inside the groups of a level."},
    {"stage", py_stage, METH_VARARGS, "Residual blocks of grouped convolutions."},
    {"use", py_use, METH_VARARGS, "Choose an instruction set."},
    {}};

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Mixing layers on a CPU.", -1, methods};

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
