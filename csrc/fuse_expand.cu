// Mix in rank space and expand to the output: y is written once. In the order they run:
//
//   mix     what B is multiplied with, and the scores
//   pack    B as the product reads it
//   expand  y

#include "expand.cuh"
#include "mix.cuh"
#include "pack.cuh"

void fuse_expand(const FuseExpand& p) {
  use_device(static_cast<int>(p.device));
  Mix m(p);
  m.h = p.h;
  m.w = p.w;
  m.scores = p.scores;
  m.u = p.u;
  mix(m);
  const int64_t RP = rank16(p.r);
  pack(p, &Bank::B, p.k, p.r, p.k, RP, false);
  Expand e(p, Space::kUp);
  e.u = p.u;
  e.L = p.k;
  e.split_k = p.split_k;
  e.bias = p.bias;
  e.out = p.y;
  for (int bank = 0; bank < p.b; ++bank) e.weights.bank[bank] = packed(p.banks[bank], p.banks[bank].B);
  e.weights.expert = p.k * RP;
  e.weights.row = RP;
  expand("fuse_expand", e);
}
