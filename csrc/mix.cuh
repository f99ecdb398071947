// Mix: what SMoLoRA does in rank space between shrink and expand. The products around it know nothing of the method:
// another mixture of low-rank experts is another mix, here, and another mix_backward, in grad_output.cu.
#pragma once

#include "common.cuh"

// What B is multiplied with, u = s share q h, and the lead, I . x_vu - I . x_if of Eq. 8; or u alone for a given lead.
struct Mix : Layout {
  const float* h = nullptr;      // (T, b, K, r)
  const float* w = nullptr;      // (M + N, r)
  const int* routes = nullptr;   // (n, b, K)
  const float* gates = nullptr;  // (n, b, K)
  float* lead = nullptr;         // (T,) out, or in
  int64_t given = 0;
  void* u = nullptr;             // (T, b K RP) T out, zero past each rank
};
void mix(const Mix& p);

