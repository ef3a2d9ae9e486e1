// dimmix._native: mixing layers on x86-64, where AVX2 or AVX-512 is. Python calls it with addresses; layers/native.py,
// native_branches.py and native_stage.py are the only callers and have checked shapes, types and strides.

#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "types.h"

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

static PyObject *answer(bool enough) {
    if (!enough) return PyErr_NoMemory();
    Py_INCREF(Py_None);
    return Py_None;
}

// What Python gives of levels: of each the 7 numbers and the 4 addresses of `Level`, in two lists.
struct Given {
    PyObject *shapes, *pointers;
    long first;  // of the levels in the lists that have not been read
};

// The next `count` levels of a Mix, and what follows from them; false with an error where they make no sense.
static bool read_levels(Given &given, long count, Level *levels, Mix &m) {
    const int numbers = 7, addresses = 4;
    const long end = given.first + count;
    const bool enough = PyList_Size(given.shapes) >= end * numbers && PyList_Size(given.pointers) >= end * addresses;
    if (!kernels || count < 0 || !enough) {
        PyErr_SetString(PyExc_ValueError, "no kernels here, or too few levels");
        return false;
    }
    for (long i = 0; i < count; i++) {
        const long at = given.first + i;
        for (int k = 0; k < numbers; k++)
            (&levels[i].groups)[k] = PyLong_AsLong(PyList_GetItem(given.shapes, at * numbers + k));
        for (int k = 0; k < addresses; k++)
            (&levels[i].weight)[k] =
                (const float *)PyLong_AsVoidPtr(PyList_GetItem(given.pointers, at * addresses + k));
    }
    if (PyErr_Occurred()) return false;
    given.first = end;
    for (long i = 1; i < count; i++)
        if (levels[i].groups * levels[i].stride * levels[i].inner !=
            levels[i - 1].groups * levels[i - 1].stride * levels[i - 1].outer) {
            PyErr_SetString(PyExc_ValueError, "a level takes other features than it is given");
            return false;
        }
    const auto raise_to = [](long &most, long value) { most = value > most ? value : most; };
    for (long i = 0; i < count; i++) {
        const Level &l = levels[i];
        raise_to(m.packed, l.inner);
        raise_to(m.hidden, l.hidden);
        raise_to(m.widest, l.groups * l.stride * (l.inner > l.outer ? l.inner : l.outer));
    }
    m.count = count;
    m.levels = levels;
    if (!count) return true;
    m.in = levels[0].groups * levels[0].stride * levels[0].inner;
    m.out = levels[count - 1].groups * levels[count - 1].stride * levels[count - 1].outer;
    return true;
}

// mix(x, x_feature, x_row, y, y_feature, y_row, rows, shapes, pointers): the lists are those of `Given`.
static PyObject *py_mix(PyObject *, PyObject *args) {
    const long most = 32;
    Mix m = {};
    Level levels[most];
    Given given = {};
    unsigned long long x, y;
    if (!PyArg_ParseTuple(
            args, "KllKlllO!O!", &x, &m.x_feature, &m.x_row, &y, &m.y_feature, &m.y_row, &m.rows, &PyList_Type,
            &given.shapes, &PyList_Type, &given.pointers))
        return nullptr;
    const long count = PyList_Size(given.pointers) / 4;
    if (count < 1 || count > most) {
        PyErr_SetString(PyExc_ValueError, "mix: 1 to 32 levels");
        return nullptr;
    }
    if (!read_levels(given, count, levels, m)) return nullptr;
    m.x = (const float *)x, m.y = (float *)y;
    bool enough;
    Py_BEGIN_ALLOW_THREADS;
    enough = run((m.rows + kernels->tile - 1) / kernels->tile, kernels->mix_memory(m), [&](long tile, float *memory) {
        kernels->mix(m, tile, memory);
    });
    Py_END_ALLOW_THREADS;
    return answer(enough);
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

// Of a branch: kind, levels, and radix, stride and heads of an attention, or side, stride and number of patches.
const int branch_numbers = 5;

// A branch from Python's lists: of each branch the numbers, two addresses of its norm or 0, and an epsilon. False with
// an error where it does not fit the images.
static bool read_branch(
    long i, const Branches &all, long height, PyObject *kinds, PyObject *norms, PyObject *epsilons, Given &given,
    Level *levels, Branch &b) {
    long number[branch_numbers];
    for (int k = 0; k < branch_numbers; k++) number[k] = PyLong_AsLong(PyList_GetItem(kinds, i * branch_numbers + k));
    const long count = number[1], N = all.tokens, C = all.channels;
    Mix &m = b.mix;
    b.kind = number[0];
    m.in = m.out = m.widest = C;
    m.gamma = (const float *)PyLong_AsVoidPtr(PyList_GetItem(norms, 2 * i));
    m.beta = (const float *)PyLong_AsVoidPtr(PyList_GetItem(norms, 2 * i + 1));
    m.epsilon = (float)PyFloat_AsDouble(PyList_GetItem(epsilons, i));
    if (PyErr_Occurred()) return false;
    bool fits = false;
    if (b.kind == ATTENTION) {
        Attend &a = b.attend;
        a.radix = number[2], a.stride = number[3], a.heads = number[4];
        fits = count == 2 && a.radix > 0 && a.stride > 0 && a.heads > 0;
        fits = fits && N % (a.radix * a.stride) == 0 && C % a.heads == 0;
        if (!read_levels(given, 1, levels, m) || !read_levels(given, 1, levels + 1, b.projection)) return false;
        fits = fits && m.in == C && m.out == 3 * C && b.projection.in == C && b.projection.out == C;
        a.head_dim = fits ? C / a.heads : 1;
        a.pitch = 3 * C, a.scale = 1 / sqrtf((float)a.head_dim);
    } else {
        if (!read_levels(given, count, levels, m)) return false;
        const long side = number[2], span = side * number[3], width = N / height;
        if (b.kind == PATCHES || b.kind == ACROSS) {
            b.patches = {C, height, width, side, number[3]};
            fits = count && side > 0 && span > 0 && height % span == 0 && width % span == 0;
            const long patches = fits ? N / (side * side) : 0;
            fits = fits && number[4] == patches && m.in == (b.kind == PATCHES ? C * side * side : patches);
        } else {
            fits = b.kind == TOKENS ? count && m.in == N : b.kind == CHANNELS && m.in == C && (count || m.gamma);
        }
        fits = fits && m.in == m.out;
    }
    if (!fits) PyErr_SetString(PyExc_ValueError, "a branch does not fit the images");
    return fits;
}

static bool run_branches(const Branches &all, long threads) {
    const long images = all.images, an_image = kernels->branches_image(all), memory = kernels->branches_memory(all);
    const bool large = an_image > 1 << 19;  // for the cache of a thread
    if (images < threads || large) {
        const long step = large ? 1 : images;
        float *buffers = plans.get(step * an_image);
        bool enough = buffers;
        for (long first = 0; enough && first < images; first += step)
            enough = kernels->branches_together(all, first, step, buffers);
        return enough;
    }
    const long chunk = kernels->branches_chunk(all, threads);
    return run((images + chunk - 1) / chunk, chunk * an_image + memory, [&](long part, float *own) {
        const long first = part * chunk, left = images - first;
        kernels->branches(all, first, left < chunk ? left : chunk, own);
    });
}

// branches(x, y, images, tokens, channels, height, threads, kinds, shapes, pointers, norms, epsilons): see `Given` and
// `read_branch`.
static PyObject *py_branches(PyObject *, PyObject *args) {
    Branches all = {};
    Given given = {};
    unsigned long long x, y;
    long height, threads;
    PyObject *kinds, *norms, *epsilons;
    if (!PyArg_ParseTuple(
            args, "KKlllllO!O!O!O!O!", &x, &y, &all.images, &all.tokens, &all.channels, &height, &threads, &PyList_Type,
            &kinds, &PyList_Type, &given.shapes, &PyList_Type, &given.pointers, &PyList_Type, &norms, &PyList_Type,
            &epsilons))
        return nullptr;
    all.x = (const float *)x, all.y = (float *)y, all.count = PyList_Size(kinds) / branch_numbers;
    if (all.count < 1 || PyList_Size(norms) != 2 * all.count || PyList_Size(epsilons) != all.count) {
        PyErr_SetString(PyExc_ValueError, "branches: lists of different lengths");
        return nullptr;
    }
    Branch *branches = (Branch *)calloc(all.count, sizeof(Branch));
    Level *levels = (Level *)calloc(PyList_Size(given.pointers) / 4 + 1, sizeof(Level));
    bool fits = branches && levels, enough = false;
    for (long i = 0; fits && i < all.count; i++)
        fits = read_branch(i, all, height, kinds, norms, epsilons, given, levels + given.first, branches[i]);
    if (fits) {
        all.branches = branches;
        Py_BEGIN_ALLOW_THREADS;
        enough = run_branches(all, threads);
        Py_END_ALLOW_THREADS;
    }
    free(branches);
    free(levels);
    return PyErr_Occurred() ? nullptr : answer(enough);
}

// Whether each convolution and each turn takes the channels that it is given, and what is added has as many.
static bool fits(long channels, const Block *blocks, long count) {
    const auto takes = [](const Convolution &c, long given) { return c.groups * c.width == given; };
    const auto turns = [](const long *turn, long given) {
        const bool none = turn[0] == 1 && turn[1] == 1 && turn[2] == 1;
        return none || (turn[0] > 0 && turn[1] > 0 && turn[2] > 0 && turn[0] * turn[1] * turn[2] == given);
    };
    for (long i = 0; i < count; i++) {
        const Block &b = blocks[i];
        if (!takes(b.first, channels) || !turns(b.turn, channels)) return false;
        if (!b.second.weight) {
            channels = b.first.out;
            continue;
        }
        const bool same = b.shortcut.weight ? takes(b.shortcut, channels) && b.shortcut.out == b.second.out
                                            : b.stride == 1 && b.second.out == channels;
        if (!same || !takes(b.second, b.first.out)) return false;
        if (!turns(b.turn_middle, b.first.out) || !turns(b.turn, b.second.out)) return false;
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
        PyErr_SetString(PyExc_ValueError, "stage: a convolution or a permutation takes other channels than it is given");
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
    {"attend", py_attend, METH_VARARGS, "Attention inside the groups of a level."},
    {"branches", py_branches, METH_VARARGS, "Residual branches over the tokens or patches of images."},
    {"stage", py_stage, METH_VARARGS, "Residual blocks of grouped convolutions."},
    {"use", py_use, METH_VARARGS, "Choose an instruction set."},
    {}};

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Mixing layers on a CPU.", -1, methods};

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
