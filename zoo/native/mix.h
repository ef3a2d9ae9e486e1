// The levels of a butterfly over one axis, all of them on a tile of rows at a time, which stays in the cache.
//
// A tile is (features, TILE): features first, so that a block product of any radix and stride reads whole vectors of
// rows, and no weight is packed. Rows come from memory a block at a time, and go back after the last level.

#define TILE (2 * LANES)

// A view of (features, rows) in memory, where one of the two strides is 1.
struct View {
    float *data;
    long feature, row;  // strides in floats
    View at(long f, long r) const { return {data + f * feature + r * row, feature, row}; }
};

// The features of a view, `step` apart, for `rows` rows of a tile; the rows beyond are 0.
static void gather(View x, long features, long step, long rows, float *tile) {
    if (rows < TILE) memset(tile, 0, 4 * TILE * features);
    if (x.row == 1)
        for (long f = 0; f < features; f++) {
            const float *from = x.data + f * step * x.feature;
            if (rows == TILE)
                memcpy(tile + f * TILE, from, 4 * TILE);
            else
                memcpy(tile + f * TILE, from, 4 * rows);
        }
    else if (step == 1)
        transpose({x.data, x.row}, rows, features, {tile, TILE});
    else
        for (long f = 0; f < features; f++)
            for (long r = 0; r < rows; r++) tile[f * TILE + r] = x.data[f * step * x.feature + r * x.row];
}

// All features of a tile, for `rows` of its rows, to a view.
static void scatter(const float *tile, long features, long rows, View y) {
    const Matrix in = {(float *)tile, TILE};
    if (y.row == 1)
        copy(in, features, rows, {y.data, y.feature});
    else
        transpose(in, features, rows, {y.data, y.row});
}

static void activate(float *x, long vectors) {
    for (long i = 0; i < vectors; i++) store(x + i * LANES, gelu(load(x + i * LANES)));
}

// LayerNorm over the features of each row of a tile, in place.
static void normalize(float *tile, long features, const float *gamma, const float *beta, float epsilon) {
    for (int c = 0; c < TILE; c += LANES) {
        Vector mean = {}, variance = {};
        for (long f = 0; f < features; f++) mean += load(tile + f * TILE + c);
        mean /= (float)features;
        for (long f = 0; f < features; f++) {
            const Vector x = load(tile + f * TILE + c) - mean;
            variance += x * x;
        }
        const Vector scale = 1.0f / SQUARE_ROOT(variance / (float)features + epsilon);
        for (long f = 0; f < features; f++) {
            float *place = tile + f * TILE + c;
            store(place, (load(place) - mean) * (scale * gamma[f]) + beta[f]);
        }
    }
}

// y += plus, `count` times `length` numbers side by side, `pitch` apart.
static void add(float *y, const float *plus, long count, long length, long pitch) {
    for (long i = 0; i < count; i++, y += pitch, plus += pitch) {
        long k = 0;
        for (; k + LANES <= length; k += LANES) store(y + k, load(y + k) + load(plus + k));
        for (; k < length; k++) y[k] += plus[k];
    }
}

// Asks for what is at TILE rows of features that a block will read or write, `step` apart, where the processor does not
// see it coming: in rows far apart, or in features of which each lies in a page of memory of its own. (Inline: a function
// that does no more than this has no effect in the compiler's eyes, and is left out.)
template <int WRITE>
INLINE void fetch(View x, long features, long step) {
    if (x.row != 1)
        for (long r = 0; r < TILE; r++)
            for (long f = 0; f < features; f += 16) __builtin_prefetch(x.at(f, r).data, WRITE);
    else if (4 * x.feature >= 4096)
        for (long f = 0; f < features; f++)
            for (long r = 0; r < TILE; r += 16) __builtin_prefetch(x.at(f * step, r).data, WRITE);
}

// One level from x to y. They may be the same tile where blocks give as many features as they take: a block is copied
// to `packed` before it is written, or it is an MLP, which writes when it has read all but what the residual takes. With
// rows far apart, x is no tile, the level is one of neighbours, and gather turns them.
static void level(const Level &l, View x, View y, float *packed, float *hidden) {
    const Matrix between = {hidden, TILE};
    const bool in_place = l.stride == 1 && l.hidden && x.row == 1;
    const long first = l.hidden ? l.hidden : l.outer;  // features that the first product of a block gives
    const auto start = [&](long block, long width) { return block / l.stride * l.stride * width + block % l.stride; };
    for (long block = 0; block < l.groups * l.stride; block++) {
        const View from = x.at(start(block, l.inner), 0), to = y.at(start(block, l.outer), 0);
        const Matrix in = in_place ? Matrix{from.data, from.feature} : Matrix{packed, TILE};
        const Matrix out = {to.data, l.stride * y.feature};
        if (!in_place) gather(from, l.inner, l.stride, TILE, packed);
        fetch<0>(x.at(start(block + 1, l.inner), 0), l.inner, l.stride);
        fetch<1>(y.at(start(block + 1, l.outer), 0), l.outer, l.stride);
        const Matrix weight = {(float *)l.weight + block * first * l.inner, l.inner};
        const float *bias = l.bias ? l.bias + block * first : nullptr;
        if (!l.hidden) {
            product<2>(l.outer, weight, l.inner, in, out, bias);
            continue;
        }
        product<2>(l.hidden, weight, l.inner, in, between, bias);
        activate(hidden, 2 * l.hidden);
        product<2>(
            l.outer, {(float *)l.weight2 + block * l.outer * l.hidden, l.hidden}, l.hidden, between, out,
            l.bias2 ? l.bias2 + block * l.outer : nullptr, l.residual ? in : none);
    }
}

// Where a thread works on a tile.
struct Tile {
    float *packed, *hidden, *here, *there;
    Tile(const Mix &m, float *memory) {
        packed = memory, hidden = packed + m.packed * TILE;
        here = hidden + m.hidden * TILE, there = here + m.widest * TILE;
    }
};

// All levels of x, which is rows where they lie or the tile `here`. Returns where the result is: at `out`, if it is not
// null and the last level may write there, else on the tile.
static View levels(const Mix &m, View x, const View *out, Tile tile) {
    for (long i = 0; i < m.count; i++) {
        const Level &l = m.levels[i];
        View y = {tile.here, TILE, 1};
        if (out && i == m.count - 1 && !l.activate)
            y = *out;
        else if (x.data == tile.here && l.inner != l.outer)
            y.data = tile.there;
        level(l, x, y, tile.packed, tile.hidden);
        if (l.activate) activate(y.data, 2 * l.groups * l.stride * l.outer);
        if (y.data == tile.there) tile.there = tile.here, tile.here = y.data;
        x = y;
    }
    return x;
}

// All levels on the rows from `part * TILE` on.
static void mix(const Mix &m, long part, float *memory) {
    const long row = part * TILE, rows = m.rows - row < TILE ? m.rows - row : TILE;
    const Tile tile(m, memory);
    const View in = {(float *)m.x + row * m.x_row, m.x_feature, m.x_row};
    const View out = {m.y + row * m.y_row, m.y_feature, m.y_row};
    // Rows side by side are read and written where they lie. Rows far apart are turned block by block as a first level
    // of neighbours takes them, else all at once, and go back at once.
    const bool whole = rows == TILE, reads = whole && !m.gamma && (in.row == 1 || m.levels[0].stride == 1);
    if (!reads) gather(in, m.in, 1, rows, tile.here);
    if (m.gamma) normalize(tile.here, m.in, m.gamma, m.beta, m.epsilon);
    const View x = reads ? in : View{tile.here, TILE, 1};
    const View result = levels(m, x, whole && out.row == 1 ? &out : nullptr, tile);
    if (result.data != out.data) scatter(result.data, m.out, rows, out);
    if (m.plus) {
        const float *plus = m.plus + row * m.y_row;
        if (out.row == 1)
            add(out.data, plus, m.out, rows, out.feature);
        else
            add(out.data, plus, rows, m.out, out.row);
    }
}

static long mix_memory(const Mix &m) { return TILE * (m.packed + m.hidden + 2 * m.widest); }
