// h -> y: mix in rank space, and expand (the symbols are those of docs/architecture.md). In the order they run:
//
//   mix     u = c h, and the scores
//   pad     B as the product reads it
//   expand  y, written once

#include "expand.cuh"
#include "mix.cuh"
#include "pad.cuh"

void fuse_expand(const FuseExpand& p) {
  use_device(static_cast<int>(p.device));
  Mix m(p);
  m.h = p.h;
  m.w = p.w;
  m.scores = p.scores;
  m.u = p.u;
  mix(m);
  const int64_t RP = rank16(p.r);
  pad(p, &Bank::B, p.k, p.r, p.k, RP, false);
  Expand e(p, Space::kUp);
  e.u = p.u;
  e.L = p.k;
  e.slices = p.slices;
  e.bias = p.bias;
  e.out = p.y;
  for (int bank = 0; bank < p.b; ++bank) e.weights.bank[bank] = padded_weight(p.banks[bank], p.banks[bank].B);
  e.weights.expert = p.k * RP;
  e.weights.row = RP;
  expand("fuse_expand", e);
}
