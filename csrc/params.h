// The parameters of each pass, as Python fills them in: device pointers, sizes and options. Sizes count elements.
//
//     T tokens, n sequences, S tokens of each (not packed), b banks, K slots of a bank, E experts of a bank
//     r rank, 1 to 128, and RP the columns that it takes in rank space: rounded up to a multiple of 16
//     d inputs, k outputs, e size of an instruction; sum E: the banks' experts one after another
//     K' slots of a bank in h and dh: 1 where its B share an A, else K
//
// Tensors are contiguous; a void* points to the compute dtype. Outputs and workspaces come uninitialised. A struct's
// fields are in one list, by which it is declared here and read in bindings.cpp. The other symbols (w, p, g, ids, ...)
// are those of docs/architecture.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// Sizes that the kernels are written for, and that the host plans with.
namespace limits {

constexpr int kBanks = 2;              // of a call
constexpr int kDecodeInputs = 512;     // inputs that a warp multiplies with a row of A in decode
constexpr int kDecodeProjections = 4;  // that one launch of decode serves
// Capacity of a block of decode: numbers of w, (sum E) r; numbers of rank space and of y at a time, at least those of
// one sequence, b K RP and a slice of k; ids, n b K, and pairs of a slot and an expert of its bank.
constexpr int kDecodeWeights = 8192;
constexpr int kDecodeMixed = 6144;
constexpr int kDecodeRoutes = 1024;
constexpr int kTile = 64;                 // tokens of a tile in the shrink and the expand
constexpr int kMixTile = 16;              // tokens of a tile in mix's gradient
constexpr int kRouteInputs = 512;         // inputs in a part of the logits of a router of x
constexpr int kWPartOutputs = 256;        // outputs in a part of w
constexpr int kChunk = 32;                // tokens of a tile in the outer product; a chunk is a multiple of it
constexpr int kRow = 128;                 // bytes of a row of a tile in shared memory
constexpr int kOuterTiles = 4;            // such rows that a block of the outer product has side by side
constexpr int kSharedMemory = 99 * 1024;  // bytes that a block may take on every card

}  // namespace limits

enum Dtype : int64_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kFloat64 = 3, kOther = 4 };
enum MixKind : int64_t { kWeighted = 0, kSmolora = 1 };
enum DecodeHalf : int64_t { kBothHalves = 0, kFirstHalf = 1, kSecondHalf = 2 };

// A parameter, or another tensor of any floating dtype, rounded to the compute dtype (or float32) where it is loaded.
struct Weight {
  const void* data = nullptr;
  int64_t dtype = kFloat32;
};

#define DECLARE_FIELD(type, name, value) type name = value;

// A bank of experts. A pass uses some of this.
#define BANK_FIELDS(FIELD)                                                                                            \
  FIELD(int64_t, E, 0)                                                                                                \
  FIELD(int64_t, dropout_stream, 0)                                                                                   \
  FIELD(Weight, A, {})                         /* (E, r, d), or (1, r, d) */                                          \
  FIELD(Weight, B, {})                         /* (E, k, r) */                                                        \
  FIELD(Weight, importance, {})                /* (k,), or (E, k) with own_importance */                              \
  FIELD(Weight, router, {})                    /* (E, d) or (E, e); or one a task, (tasks, E, ...) */                 \
  FIELD(int64_t, router_reads_x, 0)            /* the mean of the routed tokens; else the instruction */              \
  FIELD(void*, padded, nullptr)                /* buffer for A or B as the products read it; null: as it is */        \
  FIELD(const uint8_t*, trained, nullptr)      /* (E,), or null for all: experts whose A (in grad_input) or B learns */ \
  FIELD(Weight, dA, {})                        /* like A, out; null: not needed */                                    \
  FIELD(Weight, dB, {})                        /* like B, out; null: not needed */                                    \
  FIELD(Weight, dimportance, {})               /* as importance, out */

struct Bank {
  BANK_FIELDS(DECLARE_FIELD)
};

// Parameters of every pass and product.
#define LAYOUT_FIELDS(FIELD)                                                                                          \
  FIELD(int64_t, device, 0)                                                                                           \
  FIELD(void*, stream, nullptr)                                                                                       \
  FIELD(int64_t, dtype, kFloat32)              /* the compute dtype */                                                \
  FIELD(int64_t, T, 0)                                                                                                \
  FIELD(int64_t, n, 0)                                                                                                \
  FIELD(int64_t, b, 1)                                                                                                \
  FIELD(int64_t, K, 1)                                                                                                \
  FIELD(int64_t, r, 0)                                                                                                \
  FIELD(int64_t, shared, 0)                    /* the B of each bank share an A */                                    \
  FIELD(int64_t, mix, kWeighted)                                                                                      \
  FIELD(int64_t, own_importance, 0)            /* each expert has an importance vector of its own */                  \
  FIELD(double, scaling, 1)                                                                                           \
  FIELD(const int*, ids, nullptr)              /* (n, b, K), -1: none; null: slot j has expert j */                   \
  FIELD(const float*, slot_weights, nullptr)   /* (n, b, K), or null: 1 */                                            \
  FIELD(const int*, cu_seqlens, nullptr)       /* (n + 1,) boundaries of packed sequences, or null */                 \
  FIELD(const int64_t*, seed, nullptr)                                                                                \
  FIELD(int64_t, threshold, 0)                 /* of dropout in 1/256; 0: none */

struct Layout {
  LAYOUT_FIELDS(DECLARE_FIELD)
};

// A pass: its layout and banks.
struct Pass : Layout {
  Bank banks[limits::kBanks];
};

// How sequences choose their slots, where `routes` is set.
#define ROUTING_FIELDS(FIELD)                                                                                         \
  FIELD(int64_t, routes, 0)                    /* else ids and slot_weights are given */                              \
  FIELD(int64_t, gate_all, 0)                  /* weights: softmax over all experts, not the chosen */                \
  FIELD(int64_t, d, 0)                                                                                                \
  FIELD(int64_t, k, 0)                                                                                                \
  FIELD(int64_t, e, 0)                                                                                                \
  FIELD(const void*, x, nullptr)               /* (T, d) */                                                           \
  FIELD(const uint8_t*, route_mask, nullptr)   /* (T,) or null: tokens that route */                                  \
  FIELD(Weight, instruction, {})               /* (n, e) */                                                           \
  FIELD(int*, routed_ids, nullptr)             /* (n, b, K) out */                                                    \
  FIELD(float*, routed_weights, nullptr)       /* (n, b, K) out */                                                    \
  FIELD(float*, logits, nullptr)               /* (n, sum E) out */

// A projection in decode, one token a sequence: route, shrink, mix, and expand onto the base's output.
#define DECODE_FIELDS(FIELD)                                                                                          \
  ROUTING_FIELDS(FIELD)                                                                                               \
  FIELD(int64_t, half, kBothHalves)            /* the same for all projections; the first half takes no y */          \
  FIELD(int64_t, add, 0)                       /* y has the base's output in it */                                    \
  FIELD(int64_t, outputs, 64)                  /* of a slice of k: a multiple of 64 */                                \
  FIELD(float*, scores, nullptr)               /* (n,) out, if the mix makes scores */                                \
  FIELD(void*, y, nullptr)                     /* (n, k), in and out */                                               \
  FIELD(float*, h_part, nullptr)               /* (slices of d, n, sum E, r); shared: (..., n, b, r) */               \
  FIELD(float*, z_part, nullptr)               /* (slices of d, n, sum E) */                                          \
  FIELD(float*, z, nullptr)                    /* (n, sum E), of routers of the instruction */                        \
  FIELD(float*, w_part, nullptr)               /* (slices of k, sum E, r) */

struct Decode : Pass {
  DECODE_FIELDS(DECLARE_FIELD)
};

// x -> rank space.
#define ROUTE_SHRINK_FIELDS(FIELD)                                                                                    \
  ROUTING_FIELDS(FIELD)                                                                                               \
  FIELD(const int64_t*, router_rows, nullptr)  /* (n,) or null: the task of each sequence */                          \
  FIELD(int64_t, fused_routing, 0)             /* one read of x for all experts of the banks it routes */             \
  FIELD(int64_t, columns, 0)                   /* of rank space a block has: 32, 80 or 128 */                         \
  FIELD(int64_t, split_k, 1)                   /* parts of d */                                                       \
  FIELD(int64_t, sum_split_k, 1)               /* parts of d in the pass that only sums */                            \
  FIELD(int64_t*, routed, nullptr)             /* (n, 2): the first routed token, and how many */                     \
  FIELD(int*, arrived, nullptr)                /* (n,) */                                                             \
  FIELD(float*, sums, nullptr)                 /* (tiles, d) */                                                       \
  FIELD(float*, mean, nullptr)                 /* (n, d) out */                                                       \
  FIELD(float*, z_part, nullptr)               /* (n, slices of d, sum E) */                                          \
  FIELD(float*, w_part, nullptr)               /* (slices of k, sum E, r) */                                          \
  FIELD(float*, part, nullptr)                 /* (split_k, T, columns of rank space) */                              \
  FIELD(float*, h, nullptr)                    /* (T, b, K', r) out */                                                \
  FIELD(float*, w, nullptr)                    /* (sum E, r) out, if the mix makes scores */

struct RouteShrink : Pass {
  ROUTE_SHRINK_FIELDS(DECLARE_FIELD)
};

// rank space -> y.
#define FUSE_EXPAND_FIELDS(FIELD)                                                                                     \
  FIELD(int64_t, k, 0)                                                                                                \
  FIELD(int64_t, slices, 1)                    /* of k, each written by its own blocks */                             \
  FIELD(const float*, h, nullptr)              /* (T, b, K', r) */                                                    \
  FIELD(const float*, w, nullptr)              /* (sum E, r) */                                                       \
  FIELD(const void*, bias, nullptr)            /* (k,) or null */                                                     \
  FIELD(void*, u, nullptr)                     /* (T, b K RP) */                                                      \
  FIELD(float*, scores, nullptr)               /* (T,) out, if the mix makes scores */                                \
  FIELD(void*, y, nullptr)                     /* (T, k) out */

struct FuseExpand : Pass {  // `padded`: (E, k, RP)
  FUSE_EXPAND_FIELDS(DECLARE_FIELD)
};

// g = dL/dy -> rank space, and the gradients of B and I.
#define GRAD_OUTPUT_FIELDS(FIELD)                                                                                     \
  FIELD(int64_t, k, 0)                                                                                                \
  FIELD(int64_t, need_p, 0)                                                                                           \
  FIELD(int64_t, need_dw, 0)                                                                                          \
  FIELD(int64_t, need_slot_weights, 0)                                                                                \
  FIELD(int64_t, need_importance, 0)                                                                                  \
  FIELD(int64_t, fused_p_and_dB, 0)            /* from one read of g */                                               \
  FIELD(int64_t, columns, 0)                   /* a block has in the shrink: 32, 80 or 128 */                         \
  FIELD(int64_t, split_k, 1)                   /* partial p, by parts of k */                                         \
  FIELD(int64_t, chunk, 0)                     /* tokens that one block adds up for dB */                             \
  FIELD(int64_t, chunks, 0)                    /* how many of these there are */                                      \
  FIELD(const void*, g, nullptr)               /* (T, k) */                                                           \
  FIELD(const float*, h, nullptr)              /* (T, b, K', r) */                                                    \
  FIELD(const float*, w, nullptr)              /* (sum E, r) */                                                       \
  FIELD(const float*, scores, nullptr)         /* (T,), if the mix makes scores */                                    \
  FIELD(void*, u, nullptr)                     /* (T, b K RP) */                                                      \
  FIELD(float*, p_part, nullptr)               /* (split_k, T, b K RP) */                                             \
  FIELD(float*, B_part, nullptr)               /* (chunks, b K RP / 16, k, 16) */                                     \
  FIELD(int*, chunk_to_seq, nullptr)           /* (chunks,) */                                                        \
  FIELD(float*, dw_part, nullptr)              /* (tiles, b, K, r) */                                                 \
  FIELD(float*, dweights_part, nullptr)        /* (tiles, b, K, r) */                                                 \
  FIELD(int*, tile_to_seq, nullptr)            /* (tiles,) */                                                         \
  FIELD(float*, dw, nullptr)                   /* (sum E, r): s times the gradient of w */                            \
  FIELD(float*, dh, nullptr)                   /* (T, b, K', r) out */                                                \
  FIELD(float*, dslot_weights, nullptr)        /* (n, b, K) out */

struct GradOutput : Pass {  // `padded`: one read of g: (E, k, RP); two: (E, RP, k up to a multiple of 8)
  GRAD_OUTPUT_FIELDS(DECLARE_FIELD)
};

// rank space -> dx, and the gradients of A.
#define GRAD_INPUT_FIELDS(FIELD)                                                                                      \
  FIELD(int64_t, d, 0)                                                                                                \
  FIELD(int64_t, need_dx, 0)                                                                                          \
  FIELD(int64_t, need_A, 0)                                                                                           \
  FIELD(int64_t, slices, 1)                    /* of d, for dx */                                                     \
  FIELD(int64_t, chunk, 0)                     /* tokens that one block adds up for dA */                             \
  FIELD(int64_t, chunks, 0)                    /* how many of these there are */                                      \
  FIELD(const void*, x, nullptr)               /* (T, d) */                                                           \
  FIELD(const float*, dh, nullptr)             /* (T, b, K', r) */                                                    \
  FIELD(const uint8_t*, route_mask, nullptr)   /* (T,) or null: tokens that route */                                  \
  FIELD(const float*, dmean, nullptr)          /* (n, d) or null: added to them */                                    \
  FIELD(void*, u, nullptr)                     /* (T, b K' RP) */                                                     \
  FIELD(float*, A_part, nullptr)               /* (chunks, b K' RP, d) */                                             \
  FIELD(int*, chunk_to_seq, nullptr)           /* (chunks,) */                                                        \
  FIELD(void*, dx, nullptr)                    /* (T, d) out */

struct GradInput : Pass {  // `padded`: (experts of A, d, RP)
  GRAD_INPUT_FIELDS(DECLARE_FIELD)
};

void decode(const Decode* projections, int count);  // a launch for all, on the first one's device and stream
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
