// Residual branches in a row, of a few images at a time: what passes from one to the next stays in the cache.

static const long chunk_floats = 1 << 17;  // of a thread's images, between the branches

// Floats an image needs: its other half, from which and to which branches take turns, and what is inside a branch.
static long branches_image(const Branches &all) {
    long inside = 0;
    for (long i = 0; i < all.count; i++) {
        const long needed[] = {0, 1, 4, 0, 2};  // by kind
        const long of_branch = needed[all.branches[i].kind];
        inside = of_branch > inside ? of_branch : inside;
    }
    return (1 + inside) * all.tokens * all.channels;
}

// Images that a thread takes at once: as many as the cache holds, in as few rounds as need be, all threads alike.
static long branches_chunk(const Branches &all, long threads) {
    const long most = chunk_floats / branches_image(all), each = (all.images + threads - 1) / threads;
    const long rounds = most > 1 ? (each + most - 1) / most : each;
    return (each + rounds - 1) / rounds;
}

// What a tile or a group needs besides.
static long branches_memory(const Branches &all) {
    long most = 0;
    const auto raise_to = [&](long value) { most = value > most ? value : most; };
    for (long i = 0; i < all.count; i++) {
        const Branch &b = all.branches[i];
        raise_to(mix_memory(b.mix));
        if (b.kind == ACROSS) raise_to(TILE * b.patches.channels * b.patches.side * b.patches.side);
        if (b.kind != ATTENTION) continue;
        raise_to(mix_memory(b.projection));
        raise_to(attend_memory(b.attend));
    }
    return most;
}

// The sum of the lanes.
INLINE float total(Vector x) {
    float lanes[LANES], sum = 0;
    store(lanes, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return sum + lanes[0];
}

// work(place) on whole vectors, and rest(place) on what is left of n numbers.
template <class Work, class Rest>
INLINE void each_vector(long n, const Work &work, const Rest &rest) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) work(i);
    for (; i < n; i++) rest(i);
}

// LayerNorm of one row of n features side by side.
static void normalize_row(const float *x, float *y, long n, const float *gamma, const float *beta, float epsilon) {
    Vector sums = {}, squares = {};
    float sum = 0, square = 0;
    each_vector(n, [&](long i) { sums += load(x + i); }, [&](long i) { sum += x[i]; });
    const float mean = (total(sums) + sum) / n;
    each_vector(
        n,
        [&](long i) {
            const Vector d = load(x + i) - mean;
            squares += d * d;
        },
        [&](long i) { square += (x[i] - mean) * (x[i] - mean); });
    const float scale = 1 / sqrtf((total(squares) + square) / n + epsilon);
    each_vector(
        n, [&](long i) { store(y + i, (load(x + i) - mean) * (load(gamma + i) * scale) + load(beta + i)); },
        [&](long i) { y[i] = (x[i] - mean) * (gamma[i] * scale) + beta[i]; });
}

// Branches of some images. `inside` is memory for what is inside one; each(n, f) calls f(i, memory) for each i below n.
template <class Each>
struct Pass {
    const long N, C, images, rows;
    float *const inside;
    const Each &each;

    // f for each tile of n rows.
    template <class Work>
    void each_tile(long n, const Work &work) const {
        each((n + TILE - 1) / TILE, work);
    }

    void normalize_rows(const Mix &m, const float *x, float *y) const {
        each_tile(rows, [&](long part, float *) {
            for (long row = part * TILE; row < rows && row < (part + 1) * TILE; row++)
                normalize_row(x + row * C, y + row * C, C, m.gamma, m.beta, m.epsilon);
        });
    }

    // Over features side by side.
    void mix_rows(Mix m, const float *x, float *y, const float *plus) const {
        m.x = x, m.y = y, m.plus = plus, m.rows = rows;
        m.x_feature = m.y_feature = 1, m.x_row = m.in, m.y_row = m.out;
        each_tile(rows, [&](long part, float *memory) { mix(m, part, memory); });
    }

    // Over numbers of an image that lie `width` apart, without the norm.
    void mix_columns(Mix m, const float *x, float *y, const float *plus, long width) const {
        const long tiles = (width + TILE - 1) / TILE;
        m.gamma = nullptr;
        m.x_feature = m.y_feature = width, m.x_row = m.y_row = 1, m.rows = width;
        each(images * tiles, [&](long task, float *memory) {
            const long image = task / tiles * N * C;
            Mix of_image = m;
            of_image.x = x + image, of_image.y = y + image, of_image.plus = plus ? plus + image : nullptr;
            mix(of_image, task % tiles, memory);
        });
    }

    void attention(const Branch &b, const float *x, float *y) const {
        float *heads = inside + 3 * rows * C;
        mix_rows(b.mix, x, inside, nullptr);
        Attend a = b.attend;
        a.q = inside, a.k = inside + C, a.v = inside + 2 * C, a.out = heads, a.tokens = rows;
        each(rows / a.radix * a.heads, [&](long task, float *memory) { attend(a, task, memory); });
        mix_rows(b.projection, heads, y, x);
    }

    void patches(const Branch &b, const float *x, float *y) const {
        const Patches &p = b.patches;
        const long values = C * p.side * p.side, count = rows * C / values;
        Mix m = b.mix;
        m.rows = count;
        if (b.kind == PATCHES)
            return each_tile(count, [&](long part, float *memory) { mix_patches(m, p, x, y, part, memory); });
        float *mixed = inside + rows * C;
        each_tile(count, [&](long part, float *memory) { unfold(m, p, x, count, inside, part, memory); });
        mix_columns(m, inside, mixed, nullptr, values);
        each_tile(count, [&](long part, float *) { add_folded(p, x, count, mixed, y, part); });
    }

    // One branch, x -> y.
    void branch(const Branch &b, const float *x, float *y) const {
        if (b.kind == PATCHES || b.kind == ACROSS) return patches(b, x, y);
        if (b.kind == ATTENTION) return attention(b, x, y);
        if (!b.mix.count) return normalize_rows(b.mix, x, y);
        if (b.kind == CHANNELS) return mix_rows(b.mix, x, y, x);
        if (b.mix.gamma) normalize_rows(b.mix, x, inside);
        mix_columns(b.mix, b.mix.gamma ? inside : x, y, x, C);
    }
};

// All branches of `images` images from `first` on; `buffers` holds as many times `branches_image` floats.
template <class Each>
static void branches_of(const Branches &all, long first, long images, float *buffers, const Each &each) {
    const long size = all.tokens * all.channels;
    const Pass<Each> pass = {all.tokens, all.channels, images, images * all.tokens, buffers + images * size, each};
    float *there = buffers, *out = all.y + first * size;
    const float *x = all.x + first * size;
    for (long i = 0; i < all.count; i++) {
        float *y = (all.count - i) % 2 ? out : there;
        pass.branch(all.branches[i], x, y);
        x = y;
    }
}

// Some images on one thread; `memory` is their buffers, then that of a tile.
static void branches(const Branches &all, long first, long images, float *memory) {
    float *own = memory + images * branches_image(all);
    branches_of(all, first, images, memory, [&](long count, const auto &work) {
        for (long i = 0; i < count; i++) work(i, own);
    });
}

// Some images on all threads; false where one had no memory.
static bool branches_together(const Branches &all, long first, long images, float *buffers) {
    const long floats = branches_memory(all);
    bool enough = true;
    branches_of(all, first, images, buffers, [&](long count, const auto &work) {
        if (!run(count, floats, work)) enough = false;
    });
    return enough;
}
