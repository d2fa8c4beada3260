// What cpu.cpp hands to the kernels of one instruction set: a checked pass with its key schedules made once.
#ifndef ZO_CPU_WORK_H
#define ZO_CPU_WORK_H
#include "fused.h"

struct zo_key {  // of one Philox stream; round keys are widened so that SIMD code can broadcast them from memory
  zo_u64 k0[10], k1[10];
  zo_u32 param_id, tag;
  zo_u32 fresh;  // of a lane: its noise, or its sum of noises, is not that of the lane before
  zo_u32 unused;
  const float* columns;  // of a direction of low rank: V, column after column of it; null: noise without a rank
};

struct zo_work {
  const zo_pass* pass;
  const zo_update *updates, *terms;
  const zo_lane* lanes;
  const zo_key *update_keys, *rounding_keys, *mask_key, *term_keys, *lane_keys;
  int last_fold, tag;
  int past_cache;  // lanes are too large for a cache to keep: write them around it
  const void* values;  // to encode, in a plain format
  zo_u32 values_format;
};

struct zo_kernels {  // index 0: 7 rounds, 1: 10 rounds
  // elements [g, g + n) of the parameter, written to outputs from `out_at`
  void (*segment[2])(const zo_work*, zo_u64 g, zo_u64 n, zo_u64 out_at);
  void (*scales[2])(const zo_work*, zo_u64 g, zo_u64 n, zo_u64 out_at);
  void (*noise[2])(const zo_key*, zo_u64 g, zo_u64 n, float* out);
  // counts what is not finite before and after
  void (*encode)(const zo_work*, zo_u64 g, zo_u64 n, zo_u64 not_finite[2]);
  void (*gaussian_table)(float* out);
};

extern "C" {
zo_kernels zo_kernels_scalar(void);
zo_kernels zo_kernels_avx2(void);
zo_kernels zo_kernels_avx512(void);
zo_kernels zo_kernels_neon(void);
}

#endif
