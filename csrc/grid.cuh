// The barrier of all blocks of a cooperative launch, in a file of its own: what it includes takes long to compile.
#pragma once

#include "ptx.cuh"

#ifndef SMOLORA_EMULATE

#include <cooperative_groups.h>

// The driver gives each launch a barrier of its own, which resets itself: launches on several streams, and replays of a
// graph, share no counter.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

#endif
