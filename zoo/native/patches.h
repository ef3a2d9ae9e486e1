// The patches of images as the rows of a Mix, read and written where they lie in the image: no patch is copied.

// Where the first value of each of a tile's patches lies in the images, from patch `row` on; beyond the last one as the
// first.
static void patch_places(const Patches &p, long row, long rows, long *places) {
    const long span = p.side * p.stride, across = p.width / span, an_image = p.height / p.side * across * p.stride;
    for (long k = 0; k < TILE; k++) {
        long patch = row + (k < rows ? k : 0);
        const long image = patch / an_image;
        patch %= an_image;
        const long column = patch / p.stride % across * span + patch % p.stride;
        patch /= across * p.stride;
        const long line = patch / p.stride * span + patch % p.stride;
        places[k] = (image * p.channels * p.height + line) * p.width + column;
    }
}

// work(feature, offset) for each value of a patch, by channel, line and column.
template <class Work>
INLINE void patch_values(const Patches &p, const Work &work) {
    long feature = 0;
    for (long c = 0; c < p.channels; c++)
        for (long i = 0; i < p.side; i++)
            for (long j = 0; j < p.side; j++)
                work(feature++, (c * p.height + i * p.stride) * p.width + j * p.stride);
}

// The values of a tile's patches, one below the other, and their places.
static void gather_patches(const Patches &p, const float *x, long row, long rows, long *places, float *tile) {
    patch_places(p, row, rows, places);
    patch_values(p, [&](long f, long offset) {
        for (long k = 0; k < TILE; k++) tile[f * TILE + k] = x[places[k] + offset];
    });
}

// x and what the levels make of each patch's values, after a LayerNorm if there is one, on a tile of patches.
static void mix_patches(const Mix &m, const Patches &p, const float *x, float *y, long part, float *memory) {
    const long row = part * TILE, rows = m.rows - row < TILE ? m.rows - row : TILE;
    const Tile tile(m, memory);
    long places[TILE];
    gather_patches(p, x, row, rows, places, tile.here);
    if (m.gamma) normalize(tile.here, m.in, m.gamma, m.beta, m.epsilon);
    const View result = levels(m, {tile.here, TILE, 1}, nullptr, tile);
    patch_values(p, [&](long f, long offset) {
        for (long k = 0; k < rows; k++) y[places[k] + offset] = x[places[k] + offset] + result.data[f * TILE + k];
    });
}

// The values of each patch of a tile, after a LayerNorm if there is one, side by side in `out`.
static void unfold(const Mix &m, const Patches &p, const float *x, long count, float *out, long part, float *memory) {
    const long row = part * TILE, rows = count - row < TILE ? count - row : TILE, values = p.channels * p.side * p.side;
    long places[TILE];
    gather_patches(p, x, row, rows, places, memory);
    if (m.gamma) normalize(memory, values, m.gamma, m.beta, m.epsilon);
    scatter(memory, values, rows, {out + row * values, 1, values});
}

// x and the patches of a tile, whose values lie side by side in `from`.
static void add_folded(const Patches &p, const float *x, long count, const float *from, float *y, long part) {
    const long row = part * TILE, rows = count - row < TILE ? count - row : TILE, values = p.channels * p.side * p.side;
    long places[TILE];
    patch_places(p, row, rows, places);
    for (long k = 0; k < rows; k++)
        patch_values(p, [&](long f, long offset) {
            y[places[k] + offset] = x[places[k] + offset] + from[(row + k) * values + f];
        });
}
