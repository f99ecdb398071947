// What Python hands to each pass: addresses of device memory, sizes, and options. Everything is counted in elements.
//
//     T tokens, n instances, S tokens of each (not packed), b branches in use, K chosen experts of a branch
//     r rank, 1 to 128, and RP the columns that it takes in rank space: rounded up to a multiple of 16
//     d inputs, k outputs, e size of an instruction, M VU experts, N IF experts
//
// Tensors are contiguous. "T" is the compute dtype, the others are given; outputs and workspaces come uninitialised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// Sizes that the kernels are written for, and that the host plans with.
namespace limits {

constexpr int kDecodeInputs = 512;    // inputs that a warp multiplies with a row of A in decode
constexpr int kDecodeProjections = 4;  // that one launch of decode serves
// What a block of decode has room for: numbers of w, (M + N) r; of rank space and of y at a time, at least those of one
// instance, b K RP and a slice of k; routes, n b K, and experts by slots, K (M + N).
constexpr int kDecodeWeights = 8192;
constexpr int kDecodeMixed = 6144;
constexpr int kDecodeRoutes = 1024;
constexpr int kTile = 64;             // tokens of a tile in the shrink and the expand
constexpr int kMixTile = 16;          // tokens of a tile in mix's gradient
constexpr int kRouteInputs = 512;     // inputs in a part of the VU router's logits
constexpr int kPrepareOutputs = 256;  // outputs in a part of w
constexpr int kChunk = 32;            // tokens of a tile in the outer product; a chunk is a multiple of it
constexpr int kRow = 128;             // bytes of a row of a tile in shared memory
constexpr int kOuterTiles = 4;        // such rows that a block of the outer product has side by side
constexpr int kSharedMemory = 99 * 1024;  // bytes that a block may take on every card

}  // namespace limits

enum Dtype : int64_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kFloat64 = 3, kOther = 4 };

// A parameter, or another tensor of any floating dtype, rounded to the compute dtype (or float32) where it is loaded.
struct Weight {
  const void* data = nullptr;
  int64_t dtype = kFloat32;
};

// What every pass needs to know.
struct Layout {
  int64_t device = 0;
  void* stream = nullptr;
  int64_t dtype = kFloat32;    // the compute dtype
  int64_t T = 0, n = 0;        // tokens, instances
  int64_t K = 1, r = 0;        // chosen experts of a branch, rank
  int64_t M = 0, N = 0;        // experts
  int64_t use_vu = 1, use_if = 1, adaptive = 1;
  double fixed_lead = 0;       // the lead of a fusion that is not adaptive
  double scaling = 1;
  const int* cu = nullptr;     // (n + 1,) boundaries of packed instances, or null
  const int64_t* seed = nullptr;
  int64_t threshold = 0;       // of dropout in 1/256; 0: none
};

// A projection in decode, with one token an instance: routing, shrink, mix and expand onto the base's output.
struct Decode : Layout {
  int64_t d = 0, k = 0, e = 0;
  int64_t route = 0;                       // else routes and gates are given, and only copied
  int64_t add = 0;                         // y has the base's output in it
  int64_t outputs = 64;                    // of a slice of k: a multiple of 64
  const void* x = nullptr;                 // (n, d) T
  const uint8_t* mask = nullptr;           // (n,) or null: whether the token routes
  Weight instruction;                      // (n, e)
  Weight vu_A, if_A;                       // (M, r, d), (N, r, d)
  Weight vu_B, if_B;                       // (M, k, r), (N, k, r)
  Weight vu_router, if_router;             // (M, d), (N, e)
  Weight vu_importance, if_importance;     // (k,)
  const int* given_routes = nullptr;       // (n, b, K)
  const float* given_gates = nullptr;      // (n, b, K)
  int* routes = nullptr;                   // (n, b, K) out
  float* gates = nullptr;                  // (n, b, K) out
  float* logits = nullptr;                 // (n, M + N) out, if it routes
  float* lead = nullptr;                   // (n,) out
  void* y = nullptr;                       // (n, k) T, in and out
  float* h_part = nullptr;                 // (slices of d, n, M + N, r)
  float* z_part = nullptr;                 // (slices of d, n, M)
  float* z_if = nullptr;                   // (n, N)
  float* w_part = nullptr;                 // (slices of k, M + N, r)
};

// x -> rank space.
struct RouteShrink : Layout {
  int64_t d = 0, k = 0, e = 0;
  int64_t route = 0;                       // else routes are given
  int64_t one_pass = 0;                    // one pass over x for the columns of all VU experts
  int64_t columns = 0;                     // columns of rank space a block has: 32, 80 or 128
  int64_t splits = 1;                      // parts of d
  int64_t sum_splits = 1;                  // parts of d in the pass that only sums
  const void* x = nullptr;                 // (T, d) T
  const uint8_t* mask = nullptr;           // (T,) or null
  Weight instruction;                      // (n, e)
  Weight vu_A, if_A, vu_B, if_B, vu_router, if_router, vu_importance, if_importance;
  void* vu_packed = nullptr;               // (M, RP, d up to 8) T, or null: A as it is
  void* if_packed = nullptr;               // (N, RP, d up to 8) T, or null
  int* routes = nullptr;                   // (n, b, K) in or out
  float* gates = nullptr;                  // (n, b, K) out, if it routes
  float* logits = nullptr;                 // (n, M + N) out, zeros before, if it routes
  int64_t* routed = nullptr;               // (n, 2): the first routed token, and how many there are
  int* arrived = nullptr;                  // (n,)
  float* sums = nullptr;                   // (tiles, d)
  float* mean = nullptr;                   // (n, d) out
  float* z_part = nullptr;                 // (n, slices of d, M)
  float* w_part = nullptr;                 // (slices of k, M + N, r)
  float* part = nullptr;                   // (splits, T, columns of rank space)
  float* h = nullptr;                      // (T, b, K, r) out
  float* w = nullptr;                      // (M + N, r) out, if adaptive
};

// rank space -> y.
struct FuseExpand : Layout {
  int64_t k = 0;
  int64_t splits = 1;                      // parts of k
  const float* h = nullptr;                // (T, b, K, r)
  const float* w = nullptr;                // (M + N, r)
  const int* routes = nullptr;             // (n, b, K)
  const float* gates = nullptr;            // (n, b, K)
  Weight vu_B, if_B;                       // (M, k, r), (N, k, r)
  const void* bias = nullptr;              // (k,) T or null
  void* vu_packed = nullptr;               // (M, k, RP) T, or null: B as it is
  void* if_packed = nullptr;               // (N, k, RP) T, or null
  void* u = nullptr;                       // (T, b K RP) T
  float* lead = nullptr;                   // (T,) out
  void* y = nullptr;                       // (T, k) T out
};

// g = dL/dy -> rank space, and the gradients of B and I.
struct GradOutput : Layout {
  int64_t k = 0;
  int64_t need_p = 0, need_c = 0, need_gates = 0, need_vu_B = 0, need_if_B = 0, need_importance = 0;
  int64_t one_read = 0;                    // p and dB from one read of g
  int64_t columns = 0;                     // columns a block has in the shrink: 32, 80 or 128 (two reads)
  int64_t parts = 1;                       // of p
  int64_t chunk = 0, chunks = 0;           // tokens that one block adds up for dB, and how many of these there are
  const void* g = nullptr;                 // (T, k) T
  const float* h = nullptr;                // (T, b, K, r)
  const float* w = nullptr;                // (M + N, r)
  const int* routes = nullptr;             // (n, b, K)
  const float* gates = nullptr;            // (n, b, K)
  const float* lead = nullptr;             // (T,)
  Weight vu_B, if_B, vu_importance, if_importance;
  void* vu_packed = nullptr;               // one read: (M, k, RP) T, or null: B as it is; two: (M, RP, k up to 8)
  void* if_packed = nullptr;
  void* u = nullptr;                       // (T, b K RP) T
  float* p_part = nullptr;                 // (parts, T, b K RP)
  float* B_part = nullptr;                 // (chunks, b K RP / 16, k, 16)
  int* chunk_owner = nullptr;              // (chunks,)
  float* c_part = nullptr;                 // (tiles, b, K, r)
  float* q_part = nullptr;                 // (tiles, b, K, r)
  int* tile_owner = nullptr;               // (tiles,)
  float* c = nullptr;                      // (M + N, r)
  float* dh = nullptr;                     // (T, b, K, r) out
  Weight dvu_B, dif_B;                     // (M, k, r), (N, k, r) out
  Weight dvu_importance, dif_importance;   // (k,) out
  float* dgates = nullptr;                 // (n, b, K) out
};

// rank space -> dx, and the gradients of A.
struct GradInput : Layout {
  int64_t d = 0;
  int64_t need_dx = 0, need_vu_A = 0, need_if_A = 0;
  int64_t splits = 1;                      // parts of d, for dx
  int64_t chunk = 0, chunks = 0;           // as above, for dA
  const void* x = nullptr;                 // (T, d) T
  const float* dh = nullptr;               // (T, b, K, r)
  const int* routes = nullptr;             // (n, b, K)
  const uint8_t* mask = nullptr;           // (T,) or null
  const float* dmean = nullptr;            // (n, d) or null
  Weight vu_A, if_A;                       // (M, r, d), (N, r, d)
  void* vu_packed = nullptr;               // (M, d, RP) T
  void* if_packed = nullptr;               // (N, d, RP) T
  void* u = nullptr;                       // (T, b K RP) T
  float* A_part = nullptr;                 // (chunks, b K RP, d)
  int* chunk_owner = nullptr;              // (chunks,)
  void* dx = nullptr;                      // (T, d) T out
  Weight dvu_A, dif_A;                     // (M, r, d), (N, r, d) out
};

void decode(const Decode* projections, int count);  // one launch for all, on the first one's device and stream
void route_shrink(const RouteShrink& p);
void fuse_expand(const FuseExpand& p);
void grad_output(const GradOutput& p);
void grad_input(const GradInput& p);

#ifdef SMOLORA_EMULATE
void emulate_allow(uintptr_t address, size_t bytes);  // memory that launches may touch
void emulate_forget();
void emulate_order(bool reversed);  // of threads and blocks
void emulate_leave_out(const std::string& file, int line);  // a barrier; line 0: none
void emulate_self_test(int which);  // kernels with a fault each
#endif
