// A stage of residual blocks on one image: grouped 3x3 convolutions, BatchNorm, ReLU and the permutations of channels.
//
// A channel is a plane of height rows of width floats, and what lies above and below is 0. A convolution is then, for
// whole vectors that run on from row to row, a sum of the planes of its group shifted by each tap, whatever the size of
// the group; what a tap finds at the other end of a row is masked. Permuted channels are read from, or written to, other
// planes: nothing is copied. With stride 2 the planes are first dealt out by even and odd rows and columns.

struct Planes {
    float *data;
    long height, width;
    long length() const { return height * width; }
    long start() const { return (width + 16) / 16 * 16; }  // at least a row of zeros and one more
    long pitch() const { return ((start() + length() + width + 2 * LANES + 16) / 16 | 1) * 16; }  // not 4 KiB apart
    float *of(long channel) const { return data + channel * pitch() + start(); }
    void clear_edges(long channel) const {
        float *plane = of(channel);
        for (long i = -start(); i < 0; i += LANES) store(plane + i, Vector{});
        for (long i = 0; i <= width; i += LANES) store(plane + length() + i, Vector{});
    }
};

// places[j] = `step` times the channel that stands at place j after a transpose of (outer, middle, inner) to (outer,
// inner, middle).
static void turn(const long *turn, long channels, long step, int *places) {
    const long middle = turn[1], inner = turn[2];
    long j = 0;
    for (long o = 0; o < channels; o += middle * inner)
        for (long i = 0; i < inner; i++)
            for (long m = 0; m < middle; m++) places[j++] = (o + m * inner + i) * step;
}

// out[r] = scale[r] * sum over taps t and channels k of weight[r, t, k] x[t, k] + shift[r] + plus[r], at least 0 if
// `relu`. Not inline: among what its caller keeps there would be no registers left for the rows of the weight.
template <int ROWS, int VECTORS>
__attribute__((noinline)) static void taps(
    const Convolution &c, const float *weight, const int *planes, const float *x, long at, float *const *out,
    const float *const *plus, const float *scale, const float *shift, bool relu) {
    const long kernel = c.kernel * c.kernel, width = c.width, inner = kernel * width;
    const long next_channel = c.taps_first ? 1 : kernel, next_tap = c.taps_first ? c.width : 1;
    Vector sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = Vector{};
    for (long t = 0; t < kernel; t++) {
        const float *from = x + c.taps[t].offset + at, *w = weight + t * next_tap;
        Integers mask[VECTORS];
        for (int v = 0; v < VECTORS; v++) mask[v] = *(const Integers *)(c.taps[t].mask + at + v * LANES);
#pragma GCC unroll 4
        for (long k = 0; k < width; k++, w += next_channel) {
            Vector pixels[VECTORS];
            for (int v = 0; v < VECTORS; v++)
                pixels[v] = (Vector)((Integers)load(from + planes[k] + v * LANES) & mask[v]);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++) sum[r][v] += pixels[v] * w[r * inner];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) {
            Vector y = sum[r][v] * scale[r] + shift[r];
            if (plus) y += load(plus[r] + at + v * LANES);
            store(out[r] + at + v * LANES, relu ? at_least(y, 0.0f) : y);
        }
}

template <int ROWS>
static void taps_everywhere(
    const Convolution &c, const float *weight, const int *planes, const float *x, long length, float *const *out,
    const float *const *plus, const float *scale, const float *shift, bool relu) {
    long at = 0;
    for (; at + LANES < length; at += 2 * LANES)
        taps<ROWS, 2>(c, weight, planes, x, at, out, plus, scale, shift, relu);
    if (at < length) taps<ROWS, 1>(c, weight, planes, x, at, out, plus, scale, shift, relu);
}

template <int COUNT>
struct Rows {
    static constexpr int count = COUNT;
};

// Integers of the masks of planes of a size, and of the tables of a convolution.
static long mask_size(const Planes &x) { return (x.length() / LANES + 2) * LANES; }
static long table_size(const Convolution &c) { return c.groups * c.width + 3 * c.out; }

// Three masks: of what a tap one to the left, in the middle and one to the right finds in its own row.
static void make_masks(const Planes &x, int *masks) {
    const long size = mask_size(x);
    for (long i = 0; i < size; i++) {
        masks[i] = i % x.width ? -1 : 0;
        masks[size + i] = -1;
        masks[2 * size + i] = (i + 1) % x.width ? -1 : 0;
    }
}

// What a convolution needs that no image changes: its taps; of each of its inputs, in the order of its weights, how far
// its plane lies from the first; of each of its results the plane, and what it is multiplied by and added to. `phases`
// planes lie between the phases of x, if it was dealt out; the turns are of the channels of x and of y.
static void make_tables(
    Convolution &c, const Planes &x, long phases, const long *turn_in, const long *turn_out, const int *masks,
    int *memory) {
    const long channels = c.groups * c.width;
    int *planes = memory, *places = planes + channels;
    float *scale = (float *)(places + c.out), *shift = scale + c.out;
    turn(turn_in, channels, x.pitch(), planes);
    turn(turn_out, c.out, 1, places);
    for (long t = 0; t < c.kernel * c.kernel; t++) {
        long dy = c.kernel == 3 ? t / 3 - 1 : 0, dx = c.kernel == 3 ? t % 3 - 1 : 0, phase = 0;
        if (phases) {  // row 2 y + dy is row y of the even or odd ones, or y - 1 of the odd ones
            phase = (dy ? 2 : 0) + (dx ? 1 : 0);
            dy = dy < 0 ? -1 : 0, dx = dx < 0 ? -1 : 0;
        }
        c.taps[t] = {phase * phases * x.pitch() + dy * x.width + dx, masks + (dx + 1) * mask_size(x)};
    }
    for (long r = 0; r < c.out; r++) {
        scale[r] = c.gamma ? c.gamma[r] / sqrtf(c.variance[r] + c.epsilon) : 1.0f;
        shift[r] = c.gamma ? c.beta[r] - c.mean[r] * scale[r] : 0.0f;
        if (c.bias) shift[r] += c.bias[r] * scale[r];
    }
    c.planes = planes, c.places = places, c.scale = scale, c.shift = shift;
}

// Where a convolution reads and writes.
struct Place {
    Planes x, y;
    const Planes *plus;
    bool relu;
};

// Channels first .. first + count of c, all in one group and at most BLOCK of them.
static void some_channels(const Convolution &c, const Place &p, long first, long count) {
    const long inner = c.kernel * c.kernel * c.width;
    const int *planes = c.planes + first / (c.out / c.groups) * c.width, *places = c.places + first;
    const float *scale = c.scale + first, *shift = c.shift + first;
    float *out[BLOCK];
    const float *plus[BLOCK];
    for (long r = 0; r < count; r++) {
        out[r] = p.y.of(places[r]);
        if (p.plus) plus[r] = p.plus->of(places[r]);
    }
    const float *weight = c.weight + first * inner, *x = p.x.of(0);
    const float *const *adds = p.plus ? plus : nullptr;
    const long length = p.y.length();
    if (count == BLOCK) {
        taps_everywhere<BLOCK>(c, weight, planes, x, length, out, adds, scale, shift, p.relu);
    } else {
        long r = 0;
        const auto rest = [&](auto rows, long fewer) {
            for (; count - r >= fewer; r += fewer)
                taps_everywhere<decltype(rows)::count>(
                    c, weight + r * inner, planes, x, length, out + r, adds ? adds + r : nullptr, scale + r, shift + r,
                    p.relu);
        };
        rest(Rows<4>{}, 4), rest(Rows<2>{}, 2), rest(Rows<1>{}, 1);
    }
    for (long r = 0; r < count; r++) p.y.clear_edges(places[r]);
}

template <class Each>
static void convolution(const Convolution &c, const Place &p, const Each &each) {
    const long group = c.out / c.groups, parts = (group + BLOCK - 1) / BLOCK;
    each(c.groups * parts, [&](long part) {
        const long in_group = part % parts * BLOCK, left = group - in_group;
        some_channels(c, p, part / parts * group + in_group, left < BLOCK ? left : BLOCK);
    });
}

// Image (channels, height, width) of any strides -> planes.
static void read_channels(const Stage &s, const float *x, const Planes &planes, long first, long count) {
    for (long y = 0; y < s.height; y++) {
        const float *from = x + first * s.x_channel + y * s.x_row;
        float *to = planes.of(first) + y * planes.width;
        if (s.x_channel == 1)
            transpose({(float *)from, s.x_column}, s.width, count, {to, planes.pitch()});
        else
            for (long c = 0; c < count; c++)
                for (long k = 0; k < s.width; k++) to[c * planes.pitch() + k] = from[c * s.x_channel + k * s.x_column];
    }
    for (long c = first; c < first + count; c++) planes.clear_edges(c);
}

// Plane `channel` of `from` -> the same of each of the four phases in `to`, `phases` planes apart.
static void deal_out(const Planes &from, long channel, const Planes &to, long phases) {
    for (long phase = 0; phase < 4; phase++) {
        float *plane = to.of(phase * phases + channel);
        const long rows = (from.height + 1 - phase / 2) / 2, columns = (from.width + 1 - phase % 2) / 2;
        for (long y = 0; y < to.height; y++) {
            const float *row = from.of(channel) + (2 * y + phase / 2) * from.width + phase % 2;
            const long inside = y < rows ? columns : 0;
            for (long x = 0; x < to.width; x++) plane[y * to.width + x] = x < inside ? row[2 * x] : 0.0f;
        }
        to.clear_edges(phase * phases + channel);
    }
}

// Channels that a block gives.
static long channels_of(const Block &b) { return b.second.weight ? b.second.out : b.first.out; }

// Calls f(block, planes before it, planes within it, channels before it) of all blocks, the planes without memory.
template <class F>
static void each_block(const Stage &s, const F &f) {
    Planes x = {nullptr, s.height, s.width};
    long channels = s.channels;
    for (long i = 0; i < s.count; i++) {
        Block &b = s.blocks[i];
        const Planes in = {nullptr, (x.height + b.stride - 1) / b.stride, (x.width + b.stride - 1) / b.stride};
        f(b, x, in, channels);
        x = in, channels = channels_of(b);
    }
}

// Floats of the largest set of planes there is at once.
static long stage_buffer(const Stage &s) {
    long most = s.channels * Planes{nullptr, s.height, s.width}.pitch();
    each_block(s, [&](const Block &b, const Planes &, const Planes &in, long channels) {
        const long phases = b.stride == 2 ? 4 * channels : 0, out = channels_of(b);
        const long wider = b.first.out > out ? b.first.out : out;  // what lies between two convolutions may be the most
        const long planes = phases > wider ? phases : wider;
        if (planes * in.pitch() > most) most = planes * in.pitch();
    });
    return most;
}

static long stage_plan_memory(const Stage &s) {
    long size = 0;
    each_block(s, [&](const Block &b, const Planes &, const Planes &in, long) {
        size += 3 * mask_size(in) + table_size(b.first) + table_size(b.second) + table_size(b.shortcut);
    });
    return size;
}

// Fills in the tables of all convolutions.
static void stage_plan(const Stage &s, float *memory) {
    static const long same[3] = {1, 1, 1};
    int *masks = nullptr, *tables = (int *)memory;
    each_block(s, [&](Block &b, const Planes &, const Planes &in, long channels) {
        const long phases = b.stride == 2 ? channels : 0;
        if (!masks || b.stride == 2) make_masks(in, masks = tables), tables += 3 * mask_size(in);
        make_tables(b.first, in, phases, b.turn, same, masks, tables), tables += table_size(b.first);
        if (b.second.weight) make_tables(b.second, in, 0, b.turn_middle, b.turn, masks, tables);
        tables += table_size(b.second);
        if (b.shortcut.weight) make_tables(b.shortcut, in, phases, b.turn, b.turn, masks, tables);
        tables += table_size(b.shortcut);
    });
}

// All blocks on one image. `memory` holds three times `stage_buffer` floats; `each(n, f)` calls f(0) .. f(n - 1).
template <class Each>
static void stage_image(const Stage &s, long image, float *memory, const Each &each) {
    const long buffer = stage_buffer(s);
    float *here = memory, *there = memory + buffer, *middle = memory + 2 * buffer;
    Planes last = {here, s.height, s.width};
    each((s.channels + 7) / 8, [&](long part) {
        const long first = part * 8, left = s.channels - first;
        read_channels(s, s.x + image * s.x_image, last, first, left < 8 ? left : 8);
    });
    each_block(s, [&](const Block &b, Planes x, Planes in, long channels) {
        x.data = here;
        Planes out = {here, in.height, in.width};
        const Planes between = {middle, in.height, in.width};
        if (b.stride == 2) {
            in.data = there;
            each(channels, [&](long channel) { deal_out(x, channel, in, channels); });
        } else {
            in.data = here;
            if (b.shortcut.weight || !b.second.weight) out.data = there;
        }
        convolution(b.first, {in, b.second.weight ? between : out, nullptr, true}, each);
        if (b.shortcut.weight) convolution(b.shortcut, {in, out, nullptr, false}, each);
        if (b.second.weight) convolution(b.second, {between, out, &out, true}, each);
        if (out.data == there) there = here, here = out.data;
        last = out;
    });
    const long channels = channels_of(s.blocks[s.count - 1]);
    float *y = s.y + image * last.height * last.width * channels;
    each(last.height, [&](long row) {
        transpose(
            {last.of(0) + row * last.width, last.pitch()}, channels, last.width,
            {y + row * last.width * channels, channels});
    });
}

// One image on one thread.
static void stage(const Stage &s, long image, float *memory) {
    stage_image(s, image, memory, [](long count, const auto &work) {
        for (long i = 0; i < count; i++) work(i);
    });
}

// One image on all threads.
static void stage_together(const Stage &s, long image, float *memory) {
    stage_image(s, image, memory, [](long count, const auto &work) {
#pragma omp parallel for schedule(static)
        for (long i = 0; i < count; i++) work(i);
    });
}

static long stage_memory(const Stage &s) { return 3 * stage_buffer(s); }
