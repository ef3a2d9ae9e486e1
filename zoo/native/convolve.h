// A stage of residual blocks on one image: grouped 3x3 convolutions, BatchNorm, ReLU and the permutations of channels.
//
// A channel is a plane of height rows of width + 1 floats: the last one is 0, and so is what lies above and below. A
// convolution is then, for whole vectors that run on from row to row, a sum of the planes of its group shifted by each
// tap, whatever the size of the group. What comes out at the ends of rows is set to 0 again. Permuted channels are read
// from, or written to, other planes: nothing is copied. With stride 2 the planes are first dealt out by even and odd
// rows and columns.

struct Planes {
    float *data;
    long height, width;
    long row() const { return width + 1; }
    long start() const { return (width + 17) / 16 * 16; }  // at least a row of zeros and one more
    long pitch() const { return ((start() + (height + 1) * row() + 2 * LANES + 16) / 16 | 1) * 16; }  // not 4 KiB apart
    float *of(long channel) const { return data + channel * pitch() + start(); }
    void clear_edges(long channel) const {
        float *plane = of(channel);
        memset(plane - start(), 0, 4 * start());
        for (long y = 0; y < height; y++) plane[y * row() + width] = 0;
        memset(plane + height * row(), 0, 4 * (row() + 1));
    }
};

// The channel that stands at place j after a transpose of (outer, middle, inner) to (outer, inner, middle).
INLINE long turned(const long *turn, long j) {
    const long middle = turn[1], inner = turn[2];
    const long m = j % middle, i = j / middle % inner, o = j / (middle * inner);
    return (o * middle + m) * inner + i;
}

// out[r] = scale[r] * sum over i of weight[r, i] x[offsets[i]] + shift[r] + plus[r], at least 0 if `relu`.
template <int ROWS, int VECTORS>
INLINE void taps(
    const float *weight, const int *offsets, long inner, const float *x, long at, float *const *out,
    const float *const *plus, const float *scale, const float *shift, bool relu) {
    Vector sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++) sum[r][c] = Vector{};
    for (long i = 0; i < inner; i++) {
        const float *from = x + offsets[i] + at;
        Vector v[VECTORS];
        for (int c = 0; c < VECTORS; c++) v[c] = load(from + c * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < VECTORS; c++) sum[r][c] += v[c] * weight[r * inner + i];
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++) {
            Vector y = sum[r][c] * scale[r] + shift[r];
            if (plus) y += load(plus[r] + at + c * LANES);
            store(out[r] + at + c * LANES, relu ? at_least(y, 0.0f) : y);
        }
}

template <int ROWS>
static void taps_everywhere(
    const float *weight, const int *offsets, long inner, const float *x, long length, float *const *out,
    const float *const *plus, const float *scale, const float *shift, bool relu) {
    long at = 0;
    for (; at + LANES < length; at += 2 * LANES)
        taps<ROWS, 2>(weight, offsets, inner, x, at, out, plus, scale, shift, relu);
    if (at < length) taps<ROWS, 1>(weight, offsets, inner, x, at, out, plus, scale, shift, relu);
}

template <int COUNT>
struct Rows {
    static constexpr int count = COUNT;
};

// Where a convolution reads and writes. `phases` planes lie between the phases of x, if it was dealt out.
struct Place {
    Planes x;
    long phases;
    const long *turn_in, *turn_out;  // of the channels of x, of those of y and plus
    Planes y;
    const Planes *plus;
    bool relu;
};

// Channels first .. first + count of c, all in one group and at most BLOCK of them.
static void some_channels(const Convolution &c, const Place &p, long first, long count) {
    int offsets[9 * MOST_CHANNELS];
    const long group = first / (c.out / c.groups), kernel = c.kernel * c.kernel, inner = kernel * c.width;
    for (long k = 0; k < c.width; k++) {
        const long channel = turned(p.turn_in, group * c.width + k);
        for (long t = 0; t < kernel; t++) {
            long dy = c.kernel == 3 ? t / 3 - 1 : 0, dx = c.kernel == 3 ? t % 3 - 1 : 0, phase = 0;
            if (p.phases) {  // row 2 y + dy is row y of the even or odd ones, or y - 1 of the odd ones
                phase = (dy ? 2 : 0) + (dx ? 1 : 0);
                dy = dy < 0 ? -1 : 0, dx = dx < 0 ? -1 : 0;
            }
            const long plane = phase * p.phases + channel;
            offsets[c.taps_first ? t * c.width + k : k * kernel + t] = plane * p.x.pitch() + dy * p.x.row() + dx;
        }
    }
    float scale[BLOCK], shift[BLOCK], *out[BLOCK];
    const float *plus[BLOCK];
    for (long r = 0; r < count; r++) {
        const long channel = first + r, place = turned(p.turn_out, channel);
        scale[r] = c.gamma ? c.gamma[channel] / sqrtf(c.variance[channel] + c.epsilon) : 1.0f;
        shift[r] = c.gamma ? c.beta[channel] - c.mean[channel] * scale[r] : 0.0f;
        if (c.bias) shift[r] += c.bias[channel] * scale[r];
        out[r] = p.y.of(place);
        if (p.plus) plus[r] = p.plus->of(place);
    }
    const float *weight = c.weight + first * inner, *x = p.x.of(0);
    const float *const *adds = p.plus ? plus : nullptr;
    const long length = p.y.height * p.y.row();
    if (count == BLOCK) {
        taps_everywhere<BLOCK>(weight, offsets, inner, x, length, out, adds, scale, shift, p.relu);
    } else {
        long r = 0;
        const auto rest = [&](auto rows, long fewer) {
            for (; count - r >= fewer; r += fewer)
                taps_everywhere<decltype(rows)::count>(
                    weight + r * inner, offsets, inner, x, length, out + r, adds ? adds + r : nullptr, scale + r,
                    shift + r, p.relu);
        };
        rest(Rows<4>{}, 4), rest(Rows<2>{}, 2), rest(Rows<1>{}, 1);
    }
    for (long r = 0; r < count; r++) p.y.clear_edges(turned(p.turn_out, first + r));
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
        float *to = planes.of(first) + y * planes.row();
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
        for (long y = 0; y < to.height; y++)
            for (long x = 0; x < to.width; x++) {
                const long row = 2 * y + phase / 2, column = 2 * x + phase % 2;
                const bool inside = row < from.height && column < from.width;
                plane[y * to.row() + x] = inside ? from.of(channel)[row * from.row() + column] : 0.0f;
            }
        to.clear_edges(phase * phases + channel);
    }
}

// Floats of the largest set of planes there is at once.
static long stage_buffer(const Stage &s) {
    Planes x = {nullptr, s.height, s.width};
    long channels = s.channels, most = channels * x.pitch();
    for (long i = 0; i < s.count; i++) {
        const Block &b = s.blocks[i];
        if (b.stride == 2) {
            x = {nullptr, (x.height + 1) / 2, (x.width + 1) / 2};
            most = most > 4 * channels * x.pitch() ? most : 4 * channels * x.pitch();
        }
        channels = b.second.out;
        most = most > channels * x.pitch() ? most : channels * x.pitch();
    }
    return most;
}

// All blocks on one image. `memory` holds three times `stage_buffer` floats; `each(n, f)` calls f(0) .. f(n - 1).
template <class Each>
static void stage_image(const Stage &s, long image, float *memory, const Each &each) {
    const long buffer = stage_buffer(s), same[3] = {1, 1, 1};
    float *here = memory, *there = memory + buffer, *middle = memory + 2 * buffer;
    Planes x = {here, s.height, s.width};
    long channels = s.channels;
    each((channels + 7) / 8, [&](long part) {
        const long first = part * 8, left = channels - first;
        read_channels(s, s.x + image * s.x_image, x, first, left < 8 ? left : 8);
    });
    for (long i = 0; i < s.count; i++) {
        const Block &b = s.blocks[i];
        Planes in = x, out = {here, x.height, x.width};
        long phases = 0;
        if (b.stride == 2) {
            phases = channels;
            in = {there, (x.height + 1) / 2, (x.width + 1) / 2};
            out = {here, in.height, in.width};
            each(channels, [&](long channel) { deal_out(x, channel, in, phases); });
        } else if (b.shortcut.weight)
            out.data = there;
        const Planes between = {middle, in.height, in.width};
        convolution(b.first, {in, phases, b.turn, same, between, nullptr, true}, each);
        if (b.shortcut.weight) convolution(b.shortcut, {in, phases, b.turn, b.turn, out, nullptr, false}, each);
        convolution(b.second, {between, 0, b.turn_middle, b.turn, out, &out, true}, each);
        if (out.data == there) there = here, here = out.data;
        x = out, channels = b.second.out;
    }
    float *y = s.y + image * x.height * x.width * channels;
    each(x.height, [&](long row) {
        transpose(
            {x.of(0) + row * x.row(), x.pitch()}, channels, x.width, {y + row * x.width * channels, channels});
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
