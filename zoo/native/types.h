// What the kernels work on and with, and what an instruction set has of them. Included once, before all of them.

// One level over groups * inner * stride features; see ButterflySchedule. With `hidden`, each block is an MLP.
struct Level {
    long groups, stride, inner, outer, hidden, residual, activate;
    const float *weight, *bias, *weight2, *bias2;
};

// Images (channels, height, width) whose square patches are the rows of a Mix: `side` pixels a side, `stride` apart.
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
};

// q, k and v are (tokens, pitch), their first heads * head_dim columns; out is (tokens, heads * head_dim).
struct Attend {
    const float *q, *k, *v;
    float *out;
    long tokens, radix, stride, heads, head_dim, pitch;
    float scale;
};

// x + mixer(norm(x)): levels over the channels, over the tokens, of attention (`mix` makes queries, keys and values,
// `projection` the result), over the values of each patch, or across the patches. Without levels, over the channels,
// norm(x) alone.
enum Kind { CHANNELS, TOKENS, ATTENTION, PATCHES, ACROSS };
struct Branch {
    long kind;
    Mix mix, projection;
    Attend attend;
    Patches patches;
};

// Branches of images (tokens, channels), or (channels, height, width) if they are of patches; y is contiguous too.
struct Branches {
    const float *x;
    float *y;
    long images, tokens, channels, count;
    const Branch *branches;
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

// What an instruction set has.
struct Kernels {
    const char *name;
    long tile;  // rows
    long (*mix_memory)(const Mix &);
    void (*mix)(const Mix &, long tile, float *memory);
    long (*attend_memory)(const Attend &);
    void (*attend)(const Attend &, long task, float *memory);
    long (*branches_image)(const Branches &);
    long (*branches_chunk)(const Branches &, long threads);
    long (*branches_memory)(const Branches &);
    void (*branches)(const Branches &, long first, long images, float *memory);
    bool (*branches_together)(const Branches &, long first, long images, float *buffers);
    long (*stage_plan_memory)(const Stage &);
    void (*stage_plan)(const Stage &, float *memory);  // before the next two, once for all images
    long (*stage_memory)(const Stage &);
    void (*stage)(const Stage &, long image, float *memory);
    void (*stage_together)(const Stage &, long image, float *memory);
};
