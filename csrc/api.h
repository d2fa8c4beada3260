// The plain C interface of the native libraries: pointers, sizes and scalars; no torch, no Python.
//
// One call is one fused pass (fused.h) over consecutive elements of one parameter, or over gathered rows of it. The
// planes may hold all of the parameter or a piece of it.
// Everything is 64-bit clean. The structs have no padding the compiler could choose: Python packs them with `struct`.
#ifndef ZO_API_H
#define ZO_API_H
#include "formats.h"

#define ZO_ABI_VERSION 11

enum { ZO_OK = 0, ZO_ERROR_FORMAT = 1, ZO_ERROR_NOISE = 2, ZO_ERROR_ISA = 3, ZO_ERROR_MEMORY = 4, ZO_ERROR_MASK = 5,
       ZO_ERROR_TERMS = 6 };
enum { ZO_SCALAR = 0, ZO_AVX2 = 1, ZO_AVX512 = 2, ZO_NEON = 3, ZO_NUM_ISAS = 4 };

enum {
  ZO_UPDATE_FOLD = 1,
  ZO_UPDATE_SAME_STEP = 2  // not the first of its step: the mask is that of the update before
};
struct zo_update {  // w <- fma(-coeff, z(seed), w * decay), then rounded to the storage format if it folds
  zo_u64 seed;
  float coeff, decay;
  zo_u32 flags, reserved;
};

enum { ZO_LANE_SUM = 256 };
struct zo_lane {  // out <- round(fma(scale, z(seed), w)); neighbours of one seed share one z
  zo_u64 seed;    // with ZO_LANE_SUM: z is a sum of noises, d = fma(coeff, z(seed), d) for each of its terms, from d = 0;
                  // the index of the first term in the lower half, how many in the upper
  void* out;
  float scale;
  zo_u32 format;  // of out, and ZO_LANE_SUM
};

enum {
  ZO_WRITE_BACK = 1,
  ZO_STOCHASTIC = 2,
  ZO_TARGET_SCALES = 4,  // updates and lanes move the float32 scales of the groups; values are only read
  ZO_MASTER = 8,         // lanes see the master of a split format; for decoding it, without updates
  ZO_CENTRED = 16        // int4: `minima` are the groups' centres, and a code counts from 7.5: a changed scale moves a
                         // group about its centre
};

// Which elements a pass changes; of the others it only rounds what it is told to round. By magnitude: those with
// |w| <= limit, a float32's bits, w as it is before a step's first update, and for lanes as it is after all updates. By
// chance: those whose 16 random bits (8 elements a block, as for rounding, of `mask_seed`) are less than `limit`. By a
// list: `mask_seed` is its address, of zo_u32 starts[limit + 1] and zo_u16 places[starts[limit]]; the listed elements among
// [1024 t, 1024 (t + 1)) of the parameter are 1024 t + places[starts[t] .. starts[t + 1] - 1].
enum { ZO_MASK_NONE = 0, ZO_MASK_MAGNITUDE = 1, ZO_MASK_RANDOM = 2, ZO_MASK_LISTED = 3, ZO_NUM_MASKS = 4 };
enum { ZO_LISTED = 1024 };

// Directions of low rank: with `rank`, the noises of updates, terms and lanes are z = U V^T of a matrix of `columns`
// columns, made of Gaussians (zo_offload/kernels/low_rank.py). On CPUs only, and of values only.
enum { ZO_MOST_RANK = 16 };

struct zo_pass {
  void* stored;              // values plane, from the parameter's element `offset` on; as below
  void* scales;              // formats with groups: a byte or a float32 a group
  void* minima;              // int4: a bfloat16 a group, its minimum or (ZO_CENTRED) its centre; int4f, int8f: a float32;
                             // nvfp4_two: a float32 for each ZO_TWO elements
  void* residual;            // split formats, when an update folds or with ZO_MASTER
  const zo_i64* rows;        // null, or num_rows row indices: row r is elements [r * numel, (r + 1) * numel); those that
                             // are not among the planes' elements are passed over, their outputs left as they are
  const zo_update* updates;  // null: they follow this struct, the terms follow them, and the lanes those
  const zo_update* terms;    // of the sums that lanes are perturbed along: of each its seed and its coefficient
  const zo_lane* lanes;
  zo_u64 numel, offset, num_rows;
  zo_u64 total;              // elements the planes hold: where the last group ends. Without rows, numel; else whole rows
  zo_u64 mask_seed;
  zo_u32 num_updates, num_lanes;
  zo_u32 format, group;      // group: elements a scale, 16 .. 128, `offset` a multiple of it; 0: no groups
  zo_u32 param_id, distribution, rounds, flags;
  zo_u32 mask, mask_limit;   // with values as the target only
  zo_u32 num_terms;
  zo_u32 across;             // mxfp4_across: elements a row, a multiple of 8, and `offset` one of ZO_BAND rows; else 0
  zo_u32 rank, columns;      // rank 0: each element has noise of its own
};

static_assert(sizeof(zo_update) == 24 && sizeof(zo_lane) == 24 && sizeof(zo_pass) == 160, "packed by Python");

#if !defined(__CUDACC_RTC__)
#if defined(_WIN32)
#define ZO_EXPORT extern "C" __declspec(dllexport)
#else
#define ZO_EXPORT extern "C" __attribute__((visibility("default")))
#endif
// CPU library. Each returns a ZO_ERROR code; `threads` counts the caller, and the result does not depend on it.
ZO_EXPORT int zo_cpu_pass(const zo_pass* pass, int isa, int threads);
// `count` passes, one after another in memory, each followed by its updates, terms and lanes: as many calls of the above, but
// that none is run where one cannot be.
ZO_EXPORT int zo_cpu_passes(const zo_pass* passes, zo_u32 count, int isa, int threads);
// Fills the planes of `pass` (all of its format's; updates, lanes and rows are not looked at) from pass->numel values of
// a plain format. not_finite: how many values are NaN or infinite, before and after rounding.
ZO_EXPORT int zo_cpu_encode(const zo_pass* pass, const void* values, zo_u32 values_format, zo_u64* not_finite, int isa,
                            int threads);
ZO_EXPORT int zo_cpu_noise(float* out, zo_u64 numel, zo_u64 offset, zo_u64 seed, zo_u32 param_id, zo_u32 distribution,
                           zo_u32 rounds, int isa, int threads);
// z of each of the 65,536 half-words that the Gaussian is made of, out[h]: all there is of it to compare.
ZO_EXPORT int zo_cpu_gaussian_table(float* out, int isa);
ZO_EXPORT int zo_cpu_philox(const zo_u32* counter, const zo_u32* key, zo_u32 rounds, zo_u32* out);  // for known answers
// Compute on the threads of this OpenMP runtime (its GOMP_parallel and omp_get_max_threads); null: on our own pool.
ZO_EXPORT void zo_cpu_share_threads(void (*parallel)(void (*body)(void*), void* context, unsigned threads,
                                                     unsigned flags),
                                    int (*max_threads)(void));
// What formats.h says of a storage format: bits an element in the values plane, bytes of a group's scale and of its
// minimum, bytes an element in the residual plane, 1 if its values train, 1 if its scales do. To be compared with
// zo_offload/formats/; ZO_ERROR_FORMAT for a code that is none.
enum { ZO_FORMAT_FACTS = 6 };
ZO_EXPORT int zo_cpu_format(zo_u32 format, zo_u32* facts);
ZO_EXPORT zo_u32 zo_cpu_isas(void);  // bit i: ISA i is built in and this CPU has it
ZO_EXPORT zo_u32 zo_abi_version(void);
ZO_EXPORT zo_u32 zo_layout_version(void);
#endif

#endif
