// Softmax attention inside the groups of one level: one head of one group at a time, a tile of queries at a time.
//
// Queries lie across the lanes, as rows do in mix.h, and keys one below the other: largest and sum over the keys are
// then taken a vector of queries at a time.

// Scores of n keys, (n, VECTORS * LANES) -> their exponentials less the largest; `sum` gets the sums over the keys.
template <int VECTORS>
static void exponentials(Matrix scores, long n, float scale, Vector *sum) {
    Vector top[VECTORS];
    for (int c = 0; c < VECTORS; c++) top[c] = load(scores.row(0) + c * LANES), sum[c] = Vector{};
    for (long j = 1; j < n; j++)
        for (int c = 0; c < VECTORS; c++) {
            const Vector x = load(scores.row(j) + c * LANES);
            top[c] = x > top[c] ? x : top[c];
        }
    for (long j = 0; j < n; j++)
        for (int c = 0; c < VECTORS; c++) {
            float *place = scores.row(j) + c * LANES;
            const Vector e = exponential((load(place) - top[c]) * scale);
            store(place, e);
            sum[c] += e;
        }
}

// `rows` queries, k and v of n keys, (n, d) each -> out. `memory` holds (2 * d + n, TILE).
template <int VECTORS>
static void attend_tile(View q, long rows, Matrix k, Matrix v, long n, long d, float scale, View out, float *memory) {
    const Matrix queries = {memory, TILE}, scores = {memory + d * TILE, TILE}, result = {memory + (d + n) * TILE, TILE};
    Vector sum[VECTORS];
    gather(q, d, 1, rows, queries.data);
    product<VECTORS>(n, k, d, queries, scores);
    exponentials<VECTORS>(scores, n, scale, sum);
    product<VECTORS, true>(d, v, n, scores, result);
    for (int c = 0; c < VECTORS; c++) {
        const Vector inverse = 1.0f / sum[c];
        for (long i = 0; i < d; i++) {
            float *place = result.row(i) + c * LANES;
            store(place, load(place) * inverse);
        }
    }
    scatter(result.data, d, rows, out);
}

// Tasks run over (group, offset, head), head innermost.
static void attend(const Attend &a, long task, float *memory) {
    const long n = a.radix, d = a.head_dim, token = a.stride * a.pitch, token_out = a.stride * a.heads * d;
    const long head = task % a.heads, offset = task / a.heads % a.stride, group = task / a.heads / a.stride;
    const long first = group * n * a.stride + offset, here = first * a.pitch + head * d;
    const View q = {(float *)a.q + here, 1, token}, out = {a.out + first * a.heads * d + head * d, 1, token_out};
    Matrix k = {(float *)a.k + here, token}, v = {(float *)a.v + here, token};
    if (n <= LANES) return attend_tile<1>(q, n, k, v, n, d, a.scale, out, memory);
    if (n > TILE) {  // read again for each tile of queries, so from one place: tokens far apart share sets of the cache
        float *keys = memory + (2 * d + n) * TILE, *values = keys + n * d;
        copy(k, n, d, {keys, d});
        copy(v, n, d, {values, d});
        k = {keys, d}, v = {values, d};
    }
    for (long i = 0; i < n; i += TILE)
        attend_tile<2>(q.at(0, i), n - i < TILE ? n - i : TILE, k, v, n, d, a.scale, out.at(0, i), memory);
}

static long attend_memory(const Attend &a) {
    return (2 * a.head_dim + a.radix) * TILE + 2 * a.radix * a.head_dim;
}
