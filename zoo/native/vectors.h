// Vectors of LANES floats, their functions, and the small matrix product that every kernel here is made of.
//
// Included once for each instruction set, inside a namespace of its own: module.cpp says which.

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int Integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int Order __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

INLINE Vector all(float x) { return Vector{} + x; }
INLINE Vector load(const float *x) { return *(const Vector *)x; }
INLINE void store(float *x, Vector value) { *(Vector *)x = value; }
INLINE Vector at_most(Vector x, float bound) { return MINIMUM(all(bound), x); }  // both keep what is not a number
INLINE Vector at_least(Vector x, float bound) { return MAXIMUM(all(bound), x); }

// e^x for x <= 0, to 2 units in the last place: 2^n e^r with |r| <= log(2) / 2, and for e^r the polynomial of degree 5
// whose largest relative error, 1.05e-7, is the smallest that one which starts with 1 + r can have.
INLINE Vector exponential(Vector x) {
    x = at_least(x, -87.0f);
    const Vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer n is in the lowest bits
    const Vector n = shifted - 12582912.0f;
    const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;  // log(2) in two parts
    Vector y = all(8.3125015e-3f);
    y = y * r + 4.18903323e-2f;
    y = y * r + 1.66671154e-1f;
    y = y * r + 4.99992303e-1f;
    y = y * r * r + r + 1.0f;
#if LANES == 16
    return (Vector)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    const Integers power = ((Integers)shifted - 0x4b400000 + 127) << 23;
    return y * (Vector)power;
#endif
}

// x Phi(x), the exact GELU.
#if LANES == 16
// Phi(|x|) - 1/2 in 32 pieces, which two registers hold a coefficient of: cubics through Chebyshev's points, and from 5.4
// on 1/2, where it is so to 4e-8. The error is 3e-7 at most, in a quarter of the time of the quotient below.
struct Pieces {
    float of[4][32] = {};
    static constexpr double scale = 31 / 5.5;
    constexpr Pieces() {
        for (int piece = 0; piece < 31; piece++) {
            double at[4] = {}, y[4] = {}, c[4] = {};
            for (int i = 0; i < 4; i++) {
                at[i] = __builtin_cos((2 * i + 1) * 0.39269908169872414) / 2;  // pi / 8
                y[i] = __builtin_erf((piece + at[i]) / scale * 0.7071067811865476) / 2;
            }
            for (int k = 1; k < 4; k++)  // divided differences
                for (int i = 3; i >= k; i--) y[i] = (y[i] - y[i - 1]) / (at[i] - at[i - k]);
            for (int k = 3; k >= 0; k--) {  // Newton's form, from the inside
                for (int i = 3; i > 0; i--) c[i] = c[i - 1] - at[k] * c[i];
                c[0] = y[k] - at[k] * c[0];
            }
            for (int i = 0; i < 4; i++) of[i][piece] = (float)c[i];
        }
        of[0][31] = 0.5f;
    }
};
static constexpr Pieces pieces;

INLINE Vector look_up(const float *table, Integers place) {
    return (Vector)_mm512_permutex2var_ps((__m512)load(table), (__m512i)place, (__m512)load(table + 16));
}

INLINE Vector gelu(Vector x) {
    const Vector size = (Vector)((Integers)x & 0x7fffffff);
    const Vector y = at_most(size * (float)Pieces::scale, 31.0f);
    const Vector shifted = y + 12582912.0f;  // 1.5 * 2^23: the nearest piece is in the lowest bits, of which five count
    const Vector t = y - (shifted - 12582912.0f);
    const Integers piece = (Integers)shifted;
    Vector p = look_up(pieces.of[3], piece);
    p = p * t + look_up(pieces.of[2], piece);
    p = p * t + look_up(pieces.of[1], piece);
    p = p * t + look_up(pieces.of[0], piece);
    return x * 0.5f + size * p;
}
#else
// erf(z) = z P(z^2) / Q(z^2) up to |z| = 3.92, where it is 1 to 3e-8, and 1 from there: 3e-8 of a large x is no small
// number. A least-squares fit whose weights were moved until the largest error was smallest, 4.3e-8 before rounding.
INLINE Vector gelu(Vector x) {
    const Vector z = at_least(at_most(x * 0.70710678f, 3.92f), -3.92f);
    const Vector u = z * z;
    Vector p = all(1.99215056e-8f);
    p = p * u - 1.99429443e-6f;
    p = p * u + 1.48984862e-4f;
    p = p * u + 3.97280778e-3f;
    p = p * u + 5.13970005e-2f;
    p = p * u + 2.06112218e-1f;
    p = p * u + 1.12837878f;
    Vector q = all(1.02410400e-3f);
    q = q * u + 1.48890420e-2f;
    q = q * u + 1.17563720e-1f;
    q = q * u + 5.15990963e-1f;
    q = q * u + 1.0f;
    const Integers far = u >= 3.92f * 3.92f, sign = (Integers)x & (int)0x80000000;
    const Integers erf = ((Integers)(z * p / q) & ~far) | (((Integers)all(1.0f) | sign) & far);
    const Vector half = x * 0.5f;
    return half * (Vector)erf + half;
}
#endif

// A row-major matrix in memory: the distance between its rows is `pitch` floats.
struct Matrix {
    float *data;
    long pitch;
    float *row(long r) const { return data + r * pitch; }
};

static const Matrix none = {nullptr, 0};

// out[r, :] = start + sum over i of weight[r, i] in[i, :], for ROWS rows and VECTORS vectors of columns. `start` is
// plus[r, :], else bias[r], else 0; either may be null. With TURNED the weight is weight[i, r]. The sums stay in
// registers.
template <int ROWS, int VECTORS, bool TURNED>
INLINE void multiply(Matrix weight, long inner, Matrix in, Matrix out, const float *bias, Matrix plus) {
    Vector sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++)
            sum[r][c] = plus.data ? load(plus.row(r) + c * LANES) : all(bias ? bias[r] : 0.0f);
    for (long i = 0; i < inner; i++) {
        Vector x[VECTORS];
        for (int c = 0; c < VECTORS; c++) x[c] = load(in.row(i) + c * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < VECTORS; c++) sum[r][c] += x[c] * (TURNED ? weight.row(i)[r] : weight.row(r)[i]);
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++) store(out.row(r) + c * LANES, sum[r][c]);
}

// The same for any number of rows: blocks of as many as the registers hold, then what is left.
template <int VECTORS, bool TURNED = false>
static void product(
    long rows, Matrix weight, long inner, Matrix in, Matrix out, const float *bias = nullptr, Matrix plus = none) {
    const auto step = [&](long count) {
        weight.data += TURNED ? count : count * weight.pitch;
        out.data += count * out.pitch;
        if (bias) bias += count;
        if (plus.data) plus.data += count * plus.pitch;
        rows -= count;
    };
    for (; rows >= BLOCK; step(BLOCK)) multiply<BLOCK, VECTORS, TURNED>(weight, inner, in, out, bias, plus);
    if (BLOCK > 4 && rows >= 4) multiply<4, VECTORS, TURNED>(weight, inner, in, out, bias, plus), step(4);
    if (rows >= 2) multiply<2, VECTORS, TURNED>(weight, inner, in, out, bias, plus), step(2);
    if (rows) multiply<1, VECTORS, TURNED>(weight, inner, in, out, bias, plus);
}

// out[c, r] = in[r, c], eight by eight.
INLINE void transpose_eight(Matrix in, Matrix out) {
    Eight a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = *(const Eight *)in.row(i);
    for (int i = 0; i < 8; i += 2) {
        b[i] = __builtin_shuffle(a[i], a[i + 1], Order{0, 8, 1, 9, 4, 12, 5, 13});
        b[i + 1] = __builtin_shuffle(a[i], a[i + 1], Order{2, 10, 3, 11, 6, 14, 7, 15});
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = __builtin_shuffle(b[i + j], b[i + j + 2], Order{0, 1, 8, 9, 4, 5, 12, 13});
            a[i + 2 * j + 1] = __builtin_shuffle(b[i + j], b[i + j + 2], Order{2, 3, 10, 11, 6, 7, 14, 15});
        }
    for (int i = 0; i < 4; i++) {
        *(Eight *)out.row(i) = __builtin_shuffle(a[i], a[i + 4], Order{0, 1, 2, 3, 8, 9, 10, 11});
        *(Eight *)out.row(i + 4) = __builtin_shuffle(a[i], a[i + 4], Order{4, 5, 6, 7, 12, 13, 14, 15});
    }
}

#if LANES == 16
// out[c, r] = in[r, c], sixteen by sixteen: four rows of four numbers from four places make a vector, so that only what
// is inside a quarter of it is left to shuffle. Whole lines of the cache are read and written, and those that the next but
// one will write are asked for.
INLINE void transpose_sixteen(Matrix in, Matrix out) {
    for (int c = 0; c < 16; c += 4) {
        __m512 a[4], b[4];
        for (int r = 0; r < 4; r++) {
            a[r] = _mm512_castps128_ps512(_mm_loadu_ps(in.row(r) + c));
            a[r] = _mm512_insertf32x4(a[r], _mm_loadu_ps(in.row(r + 4) + c), 1);
            a[r] = _mm512_insertf32x4(a[r], _mm_loadu_ps(in.row(r + 8) + c), 2);
            a[r] = _mm512_insertf32x4(a[r], _mm_loadu_ps(in.row(r + 12) + c), 3);
        }
        for (int r = 0; r < 4; r += 2) {
            b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
            b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
        }
        for (int r = 0; r < 2; r++) {
            _mm512_storeu_ps(out.row(c + 2 * r), _mm512_shuffle_ps(b[r], b[r + 2], 0x44));
            _mm512_storeu_ps(out.row(c + 2 * r + 1), _mm512_shuffle_ps(b[r], b[r + 2], 0xee));
            __builtin_prefetch(out.row(c + 2 * r) + 32, 1);
            __builtin_prefetch(out.row(c + 2 * r + 1) + 32, 1);
        }
    }
}
#endif

// out[c, r] = in[r, c], rows by columns.
static void transpose(Matrix in, long rows, long columns, Matrix out) {
    long r = 0;
#if LANES == 16
    for (; r + 16 <= rows; r += 16) {
        long c = 0;
        for (; c + 16 <= columns; c += 16) transpose_sixteen({in.row(r) + c, in.pitch}, {out.row(c) + r, out.pitch});
        for (; c + 8 <= columns; c += 8)
            for (long k = r; k < r + 16; k += 8)
                transpose_eight({in.row(k) + c, in.pitch}, {out.row(c) + k, out.pitch});
        for (; c < columns; c++)
            for (long k = r; k < r + 16; k++) out.row(c)[k] = in.row(k)[c];
    }
#endif
    for (; r + 8 <= rows; r += 8) {
        long c = 0;
        for (; c + 8 <= columns; c += 8) {
            transpose_eight({in.row(r) + c, in.pitch}, {out.row(c) + r, out.pitch});
            if (c % 16 == 0)  // rows are too short for the processor to see where they go on
                for (int k = 8; k < 16; k++) __builtin_prefetch(in.row(r + k) + c);
        }
        for (; c < columns; c++)
            for (long k = r; k < r + 8; k++) out.row(c)[k] = in.row(k)[c];
    }
    for (; r < rows; r++)
        for (long c = 0; c < columns; c++) out.row(c)[r] = in.row(r)[c];
}

// out[r, :] = in[r, :]. What lies behind in the same row, where the next head of an attention is, comes closer.
static void copy(Matrix in, long rows, long columns, Matrix out) {
    for (long r = 0; r < rows; r++) {
        long c = 0;
        for (; c + LANES <= columns; c += LANES) {
            store(out.row(r) + c, load(in.row(r) + c));
            __builtin_prefetch(in.row(r) + c + columns);
        }
        for (; c < columns; c++) out.row(r)[c] = in.row(r)[c];
    }
}
