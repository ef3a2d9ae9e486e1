// What module.cpp includes once for each instruction set: all kernels for vectors of LANES floats.

#include "vectors.h"
#include "mix.h"
#include "patches.h"
#include "attend.h"
#include "branches.h"
#include "convolve.h"

#define NAME_OF(lanes) ((lanes) == 16 ? "avx512" : "avx2")
static const Kernels kernels = {
    NAME_OF(LANES), TILE, mix_memory, mix, attend_memory, attend, branches_image, branches_chunk, branches_memory,
    branches, branches_together, stage_plan_memory, stage_plan, stage_memory, stage, stage_together};

#undef INLINE
#undef TILE
#undef NAME_OF
