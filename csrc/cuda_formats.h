// Storage formats on a GPU: a thread's 8 consecutive elements between the bytes of their planes and float32 registers.
// No #include but our own headers; formats.h has the arithmetic, cpu_formats.h the same stages for a CPU.
//
// A group of 16 to 128 elements lies in 2 to 16 neighbouring threads of one warp: its largest magnitude is found by
// shuffles, and its scale is in all of them. So `load` and `fold` are called by whole warps.
#ifndef ZO_CUDA_FORMATS_H
#define ZO_CUDA_FORMATS_H
#include "fused.h"

namespace zo_cuda {

#define ZO_DEV static __device__ __forceinline__
typedef ZoScalar S;

struct alignas(16) Vec16 {
  zo_u32 x, y, z, w;
};
struct alignas(8) Vec8 {
  zo_u32 x, y;
};

// ---- memory: 8 elements of SIZE bytes as 2 * SIZE words. WHOLE: all of them exist, and their address is a multiple of
// 16 (8 for one-byte elements); else only [lo, hi) of them do.

template <bool WHOLE, int SIZE>
ZO_DEV void read_bytes(const zo_u8* p, int lo, int hi, zo_u32 (&word)[2 * SIZE]) {
  if constexpr (WHOLE) {
    if constexpr (SIZE == 1) {
      const Vec8 v = *(const Vec8*)p;
      word[0] = v.x, word[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < SIZE / 2; ++i) {
        const Vec16 v = ((const Vec16*)p)[i];
        word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2 * SIZE; ++i) word[i] = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < lo || j >= hi) continue;
      if constexpr (SIZE == 4) word[j] = ((const zo_u32*)p)[j];
      if constexpr (SIZE == 2) word[j / 2] |= (zo_u32)((const zo_u16*)p)[j] << (16 * (j & 1));
      if constexpr (SIZE == 1) word[j / 4] |= (zo_u32)p[j] << (8 * (j & 3));
    }
  }
}

template <bool WHOLE, int SIZE>
ZO_DEV void write_bytes(zo_u8* p, int lo, int hi, const zo_u32 (&word)[2 * SIZE]) {
  if constexpr (WHOLE) {
    if constexpr (SIZE == 1) {
      *(Vec8*)p = Vec8{word[0], word[1]};
    } else {
#pragma unroll
      for (int i = 0; i < SIZE / 2; ++i)
        ((Vec16*)p)[i] = Vec16{word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]};
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < lo || j >= hi) continue;
      if constexpr (SIZE == 4) ((zo_u32*)p)[j] = word[j];
      if constexpr (SIZE == 2) ((zo_u16*)p)[j] = (zo_u16)(word[j / 2] >> (16 * (j & 1)));
      if constexpr (SIZE == 1) p[j] = (zo_u8)(word[j / 4] >> (8 * (j & 3)));
    }
  }
}

// ---- rounding to 16 bits, two at a time: one instruction, and a branch that only a NaN takes

ZO_DEV zo_u32 pack_bf16(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  zo_u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  if (!(a == a && b == b)) r = zo_bf16_round<S>(a) >> 16 | (zo_bf16_round<S>(b) & 0xffff0000u);
  return r;
#else
  return zo_bf16_round<S>(a) >> 16 | (zo_bf16_round<S>(b) & 0xffff0000u);
#endif
}

ZO_DEV zo_u32 pack_fp16(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  zo_u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  if (!(a == a && b == b)) r = zo_fp16_round<S>(a) | zo_fp16_round<S>(b) << 16;
  return r;
#else
  return zo_fp16_round<S>(a) | zo_fp16_round<S>(b) << 16;
#endif
}

template <bool WHOLE>
ZO_DEV void write_fp32(zo_u8* p, int lo, int hi, const float (&w)[8]) {
  zo_u32 word[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) word[j] = zo_fp32_round<S>(w[j]);
  write_bytes<WHOLE, 4>(p, lo, hi, word);
}

template <bool WHOLE>
ZO_DEV void write_bf16(zo_u8* p, int lo, int hi, const float (&w)[8]) {
  zo_u32 word[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) word[j] = pack_bf16(w[2 * j], w[2 * j + 1]);
  write_bytes<WHOLE, 2>(p, lo, hi, word);
}

template <bool WHOLE>
ZO_DEV void write_fp16(zo_u8* p, int lo, int hi, const float (&w)[8]) {
  zo_u32 word[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) word[j] = pack_fp16(w[2 * j], w[2 * j + 1]);
  write_bytes<WHOLE, 2>(p, lo, hi, word);
}

ZO_DEV zo_u32 format_of(const zo_lane& lane) { return lane.format & ~(zo_u32)ZO_LANE_SUM; }

// out: a lane's output; its dtype is the same for a whole launch's thread, so the branch never diverges
template <bool WHOLE>
ZO_DEV void write_lane(const zo_lane& lane, zo_u64 at, int lo, int hi, const float (&w)[8]) {
  const zo_u32 format = format_of(lane);
  zo_u8* out = (zo_u8*)lane.out + at * (format == ZO_FP32 ? 4 : 2);
  if (format == ZO_FP32)
    write_fp32<WHOLE>(out, lo, hi, w);
  else if (format == ZO_BF16)
    write_bf16<WHOLE>(out, lo, hi, w);
  else
    write_fp16<WHOLE>(out, lo, hi, w);
}


// ---- planes

struct Group {  // of a thread's elements
  float scale, minimum;
  zo_u32 exponent;  // instead of `scale`, for fp8
};

// Where 8 elements are: `at` from the planes' first, [lo, hi) of them exist in memory.
struct Eight {
  zo_i64 at;
  int lo, hi;
};

ZO_DEV zo_u32 byte_of(const zo_u32* word, int j) { return word[j / 4] >> (8 * (j & 3)) & 0xffu; }
ZO_DEV zo_u32 half_of(const zo_u32* word, int j) { return word[j / 2] >> (16 * (j & 1)) & 0xffffu; }
ZO_DEV zo_u32 half_word(const zo_words& r, int j) { return r.w[j / 2] >> (16 * (j & 1)) & 0xffffu; }

ZO_DEV float from_half(zo_u32 code) {  // exact, as zo_fp16_decode is
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((zo_u16)code));
  return x;
#else
  return zo_fp16_decode<S>(code);
#endif
}

// Selects: a table would be read by a different index in every thread.
ZO_DEV float table_number(const float (&v)[16], zo_u32 code) {
  const bool a = code & 1, b = code & 2, c = code & 4, d = code & 8;
  float x[8], y[4];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = a ? v[2 * i + 1] : v[2 * i];
#pragma unroll
  for (int i = 0; i < 4; ++i) y[i] = b ? x[2 * i + 1] : x[2 * i];
  const float low = c ? y[1] : y[0], high = c ? y[3] : y[2];
  return d ? high : low;
}

ZO_HD constexpr bool is_fp8(int format) { return format == ZO_FP8_E4M3 || format == ZO_FP8_E5M2 || format == ZO_FP8_8; }
ZO_HD constexpr bool is_int8(int format) { return format == ZO_INT8 || format == ZO_INT8_8; }
ZO_HD constexpr bool has_minimum(int format) { return format == ZO_INT4 || format == ZO_INT4F || format == ZO_INT8F; }
ZO_HD constexpr bool is_e2m1(int format) {
  return format == ZO_MXFP4 || format == ZO_NVFP4 || format == ZO_NVFP4_TWO || format == ZO_MXFP4_ACROSS;
}
ZO_HD constexpr bool is_four(int format) {
  return format == ZO_INT4 || format == ZO_NF4 || format == ZO_INT4F || is_e2m1(format) || format == ZO_FP4;
}
ZO_HD constexpr bool is_trained_group(int format) { return is_fp8(format) || is_int8(format); }
ZO_HD constexpr bool is_grouped(int format) {
  if (format == ZO_MXFP4_ACROSS) return false;  // an element's scale has nothing to do with its neighbours'
  return is_trained_group(format) || is_four(format) || format == ZO_INT8F || format == ZO_FP8F || format == ZO_INT8_127;
}
ZO_HD constexpr bool is_bf16(int format) { return format == ZO_BF16 || format == ZO_BF16_16 || format == ZO_BF16_8; }
ZO_HD constexpr int residual_size(int format) {
  return format == ZO_BF16_16 ? 2 : format == ZO_BF16_8 || format == ZO_INT8_8 || format == ZO_FP8_8 ? 1 : 0;
}
ZO_HD constexpr int value_size(int format) { return format == ZO_FP32 ? 4 : is_bf16(format) || format == ZO_FP16 ? 2 : 1; }

// Of an element, counted from where elements are: 64-bit division takes a hundred steps.
ZO_DEV zo_u64 group_of(const zo_pass& pass, zo_u64 at) {
  return at >> (pass.group == 128 ? 7 : pass.group == 64 ? 6 : pass.group == 32 ? 5 : 4);
}

template <int FORMAT>
ZO_DEV Group load_group(const zo_pass& pass, const Eight& e) {
  Group group = {0.0f, 0.0f, 0};
  if constexpr (is_grouped(FORMAT)) {
    if (e.lo >= e.hi) return group;
    const zo_u64 k = group_of(pass, e.at);
    if constexpr (is_fp8(FORMAT) || FORMAT == ZO_MXFP4)
      group.exponent = ((const zo_u8*)pass.scales)[k];
    else if constexpr (FORMAT == ZO_NVFP4_TWO)
      group.scale = zo_two_scale(S::mul(from_half(zo_e4m3_half<S>(((const zo_u8*)pass.scales)[k])), 256.0f),
                                 ((const float*)pass.minima)[(zo_u64)e.at / ZO_TWO]);
    else
      group.scale = ((const float*)pass.scales)[k];
    if constexpr (FORMAT == ZO_INT4F || FORMAT == ZO_INT8F) group.minimum = ((const float*)pass.minima)[k];
    if constexpr (FORMAT == ZO_INT4) group.minimum = S::value((zo_u32)((const zo_u16*)pass.minima)[k] << 16);
  }
  return group;
}

// number * factor is the value
template <int FORMAT>
ZO_DEV float factor_of(const Group& group) {
  if constexpr (is_fp8(FORMAT)) return zo_fp8_factor(FORMAT, group.exponent);
  if constexpr (FORMAT == ZO_MXFP4) return zo_mx_factor(group.exponent);
  if constexpr (FORMAT == ZO_FP8F) return zo_fp8f_factor(group.scale);
  return group.scale;
}

template <int FORMAT>
ZO_DEV float number_of(zo_u32 code) {
  if constexpr (FORMAT == ZO_FP8_E5M2) return from_half(zo_e5m2_half<S>(code));
  if constexpr (is_fp8(FORMAT) || FORMAT == ZO_FP8F) return from_half(zo_e4m3_half<S>(code));
  if constexpr (is_int8(FORMAT) || FORMAT == ZO_INT8_127) return zo_int8_number<S>(code);
  if constexpr (FORMAT == ZO_NF4) {
    const float values[16] = ZO_NF4_VALUES;
    return table_number(values, code);
  }
  if constexpr (is_e2m1(FORMAT)) {
    const float values[16] = ZO_E2M1_VALUES;
    return table_number(values, code);
  }
  if constexpr (FORMAT == ZO_FP4) {
    const float values[16] = ZO_FP4_VALUES;
    return table_number(values, code);
  }
  return S::to_float(code);
}

template <int FORMAT>
ZO_DEV float value_of(float number, const Group& group) {
  if constexpr (has_minimum(FORMAT)) return S::fma(number, group.scale, group.minimum);
  if constexpr (FORMAT == ZO_INT8_127) return S::mul(S::mul(number, group.scale), ZO_INVERSE_127);
  return S::mul(number, factor_of<FORMAT>(group));
}

// Numbers of codes of 8 or 4 bits, before their group's scale; of int4, counted from 7.5 where groups have a centre.
template <bool WHOLE, int FORMAT>
ZO_DEV void load_numbers(const zo_pass& pass, const Eight& e, float (&n)[8]) {
  if constexpr (is_four(FORMAT)) {
    const zo_u8* p = (const zo_u8*)pass.stored + e.at / 2;
    zo_u32 word = 0;
    if constexpr (WHOLE) {
      word = *(const zo_u32*)p;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (2 * i < e.hi && 2 * i + 1 >= e.lo) word |= (zo_u32)p[i] << (8 * i);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) n[j] = number_of<FORMAT>(word >> (4 * j) & 15u);
    if constexpr (FORMAT == ZO_INT4) {
      const float middle = zo_int4_middle(pass.flags & ZO_CENTRED);
#pragma unroll
      for (int j = 0; j < 8; ++j) n[j] = S::add(n[j], -middle);
    }
  } else {
    zo_u32 word[2];
    read_bytes<WHOLE, 1>((const zo_u8*)pass.stored + e.at, e.lo, e.hi, word);
#pragma unroll
    for (int j = 0; j < 8; ++j) n[j] = number_of<FORMAT>(byte_of(word, j));
  }
}

// w = numbers times their factors, of mxfp4_across: 8 elements lie in one row.
template <bool WHOLE>
ZO_DEV void scale_across(const zo_pass& pass, const Eight& e, float (&w)[8]) {
  zo_u32 word[2];
  read_bytes<WHOLE, 1>((const zo_u8*)pass.scales + zo_across_scale((zo_u64)e.at, pass.across), e.lo, e.hi, word);
#pragma unroll
  for (int j = 0; j < 8; ++j) w[j] = S::mul(w[j], zo_mx_factor(byte_of(word, j)));
}

ZO_DEV void unpack_bf16(const zo_u32 (&word)[4], float (&w)[8]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    w[2 * j] = S::value(word[j] << 16);
    w[2 * j + 1] = S::value(word[j] & 0xffff0000u);
  }
}

// w = what lanes see, or (master) the master of a split format
template <bool WHOLE, int FORMAT>
ZO_DEV void load(const zo_pass& pass, const Eight& e, const Group& group, bool master, float (&w)[8]) {
  const zo_u8* stored = (const zo_u8*)pass.stored;
  if constexpr (FORMAT == ZO_FP32) {
    zo_u32 word[8];
    read_bytes<WHOLE, 4>(stored + 4 * e.at, e.lo, e.hi, word);
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = S::value(word[j]);
  } else if constexpr (FORMAT == ZO_FP16) {
    zo_u32 word[4];
    read_bytes<WHOLE, 2>(stored + 2 * e.at, e.lo, e.hi, word);
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = from_half(half_of(word, j));
  } else if constexpr (is_bf16(FORMAT)) {
    zo_u32 word[4];
    read_bytes<WHOLE, 2>(stored + 2 * e.at, e.lo, e.hi, word);
    unpack_bf16(word, w);
    if constexpr (FORMAT == ZO_BF16_16) {
      if (master) {
        zo_u32 low[4];
        read_bytes<WHOLE, 2>((const zo_u8*)pass.residual + 2 * e.at, e.lo, e.hi, low);
#pragma unroll
        for (int j = 0; j < 8; ++j) w[j] = S::value(zo_join<S, 16>(half_of(word, j), half_of(low, j)));
      }
    }
    if constexpr (FORMAT == ZO_BF16_8) {
      if (master) {
        zo_u32 low[2];
        read_bytes<WHOLE, 1>((const zo_u8*)pass.residual + e.at, e.lo, e.hi, low);
#pragma unroll
        for (int j = 0; j < 8; ++j) w[j] = S::value(zo_join<S, 8>(half_of(word, j), byte_of(low, j)) << 8);
      }
    }
  } else {
    load_numbers<WHOLE, FORMAT>(pass, e, w);
    if constexpr (FORMAT == ZO_MXFP4_ACROSS) {
      scale_across<WHOLE>(pass, e, w);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) w[j] = value_of<FORMAT>(w[j], group);
    }
    if constexpr (residual_size(FORMAT) != 0) {
      if (master) {
        zo_u32 word[2], low[2];
        read_bytes<WHOLE, 1>(stored + e.at, e.lo, e.hi, word);
        read_bytes<WHOLE, 1>((const zo_u8*)pass.residual + e.at, e.lo, e.hi, low);
        const float factor = S::mul(factor_of<FORMAT>(group), 0.00390625f);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const zo_u32 code = zo_join<S, 8>(byte_of(word, j), byte_of(low, j));
          w[j] = S::mul(FORMAT == ZO_FP8_8 ? zo_fp8_master_value<S>(code) : zo_int16_number<S>(code), factor);
        }
      }
    }
  }
}

// Largest magnitude of a group, as bits: a NaN is above infinity.
ZO_DEV zo_u32 largest_of(const float (&w)[8], zo_u32 group) {
  zo_u32 most = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) most = S::most_u(most, zo_magnitude<S>(w[j]));
  most = S::most_u(most, __shfl_xor_sync(0xffffffffu, most, 1));
  if (group >= 32) most = S::most_u(most, __shfl_xor_sync(0xffffffffu, most, 2));
  if (group >= 64) most = S::most_u(most, __shfl_xor_sync(0xffffffffu, most, 4));
  if (group == 128) most = S::most_u(most, __shfl_xor_sync(0xffffffffu, most, 8));
  return most;
}

template <int FORMAT>
ZO_DEV zo_u32 round_scaled(float x, bool stochastic, zo_u32 r) {
  if constexpr (FORMAT == ZO_FP8_E4M3) return stochastic ? zo_e4m3_round_stochastic<S>(x, r) : zo_e4m3_round<S>(x);
  if constexpr (FORMAT == ZO_FP8_E5M2) return stochastic ? zo_e5m2_round_stochastic<S>(x, r) : zo_e5m2_round<S>(x);
  if constexpr (FORMAT == ZO_INT8) return stochastic ? zo_int8_round_stochastic<S>(x, r) : zo_int8_round<S>(x);
  if constexpr (FORMAT == ZO_FP8_8) return stochastic ? zo_fp8_master_stochastic<S>(x, r) : zo_fp8_master<S>(x);
  return stochastic ? zo_int16_round_stochastic<S>(x, r) : zo_int16_round<S>(x);
}

template <bool WHOLE, int FORMAT>
ZO_DEV void fold_group(const zo_pass& pass, const Eight& e, Group& group, float (&w)[8], bool stochastic,
                       const zo_words& random, bool last, bool keep) {
  if constexpr (!WHOLE)
#pragma unroll
    for (int j = 0; j < 8; ++j)  // what is not the group's must not move its scale
      if (j < e.lo || j >= e.hi) w[j] = 0.0f;
  const zo_u32 largest = largest_of(w, pass.group);
  float inverse;
  if constexpr (is_fp8(FORMAT)) {
    group.exponent = zo_fp8_exponent(largest, zo_fp8_top(FORMAT));
    inverse = zo_fp8_inverse(group.exponent);
  } else {
    group.scale = zo_int8_scale(largest, group.scale);
    inverse = zo_inverse(FORMAT == ZO_INT8_8 ? S::mul(group.scale, 0.00390625f) : group.scale);
  }
  const float factor = factor_of<FORMAT>(group), fine = S::mul(factor, 0.00390625f);
  zo_u32 word[2] = {0, 0}, low[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const zo_u32 code = round_scaled<FORMAT>(zo_scaled<S>(w[j], inverse), stochastic, half_word(random, j));
    if constexpr (residual_size(FORMAT) != 0) {
      const zo_u32 coarse = zo_coarse<S, 8>(code) & 0xffu;
      word[j / 4] |= coarse << (8 * (j & 3));
      low[j / 4] |= (code & 0xffu) << (8 * (j & 3));
      const float number = FORMAT == ZO_FP8_8 ? zo_fp8_master_value<S>(code) : zo_int16_number<S>(code);
      w[j] = last ? S::mul(number_of<FORMAT>(coarse), factor) : S::mul(number, fine);
    } else {
      word[j / 4] |= code << (8 * (j & 3));
      w[j] = S::mul(number_of<FORMAT>(code), factor);
    }
  }
  if (!keep) return;
  write_bytes<WHOLE, 1>((zo_u8*)pass.stored + e.at, e.lo, e.hi, word);
  if constexpr (residual_size(FORMAT) != 0) write_bytes<WHOLE, 1>((zo_u8*)pass.residual + e.at, e.lo, e.hi, low);
  if ((e.at & (pass.group - 1)) != 0) return;  // the group's first thread writes its scale
  if constexpr (is_fp8(FORMAT))
    ((zo_u8*)pass.scales)[group_of(pass, e.at)] = (zo_u8)group.exponent;
  else
    ((float*)pass.scales)[group_of(pass, e.at)] = group.scale;
}

// w = decode(encode(w)), and the bytes where `keep`; of a split format the master's value but for the last fold.
// random: 8 half-words, looked at if `stochastic`
template <bool WHOLE, int FORMAT>
ZO_DEV void fold(const zo_pass& pass, const Eight& e, Group& group, float (&w)[8], bool stochastic,
                 const zo_words& random, bool last, bool keep) {
  zo_u8* stored = (zo_u8*)pass.stored;
  if constexpr (FORMAT == ZO_FP32) {
    if (keep) write_fp32<WHOLE>(stored + 4 * e.at, e.lo, e.hi, w);
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = S::value(zo_fp32_round<S>(w[j]));
  } else if constexpr (FORMAT == ZO_BF16 || FORMAT == ZO_FP16) {
    zo_u32 word[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float a = w[2 * j], b = w[2 * j + 1];
      const zo_u32 ra = half_word(random, 2 * j), rb = half_word(random, 2 * j + 1);
      if constexpr (FORMAT == ZO_BF16)
        word[j] = stochastic ? zo_bf16_round_stochastic<S>(a, ra) >> 16 | (zo_bf16_round_stochastic<S>(b, rb) & 0xffff0000u)
                             : pack_bf16(a, b);
      else
        word[j] = stochastic ? zo_fp16_round_stochastic<S>(a, ra) | zo_fp16_round_stochastic<S>(b, rb) << 16 : pack_fp16(a, b);
    }
    if (keep) write_bytes<WHOLE, 2>(stored + 2 * e.at, e.lo, e.hi, word);
    if constexpr (FORMAT == ZO_BF16)
      unpack_bf16(word, w);
    else
#pragma unroll
      for (int j = 0; j < 8; ++j) w[j] = from_half(half_of(word, j));
  } else if constexpr (is_bf16(FORMAT)) {
    zo_u32 word[4] = {0, 0, 0, 0}, low[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      zo_u32 master;  // as the bits of a float32
      if constexpr (FORMAT == ZO_BF16_16)
        master = zo_fp32_round<S>(w[j]);
      else
        master = (stochastic ? zo_bf24_round_stochastic<S>(w[j], half_word(random, j)) : zo_bf24_round<S>(w[j])) << 8;
      const zo_u32 coarse = master + 0x8000u;  // rounded, in the upper half
      word[j / 2] |= (coarse >> 16) << (16 * (j & 1));
      if constexpr (FORMAT == ZO_BF16_16)
        low[j / 2] |= (master & 0xffffu) << (16 * (j & 1));
      else
        low[j / 4] |= (master >> 8 & 0xffu) << (8 * (j & 3));
      w[j] = last ? zo_bf16_value<S>(coarse) : S::value(master);
    }
    if (!keep) return;
    write_bytes<WHOLE, 2>(stored + 2 * e.at, e.lo, e.hi, word);
    if constexpr (FORMAT == ZO_BF16_16) {
      write_bytes<WHOLE, 2>((zo_u8*)pass.residual + 2 * e.at, e.lo, e.hi, low);
    } else {
      const zo_u32 bytes[2] = {low[0], low[1]};
      write_bytes<WHOLE, 1>((zo_u8*)pass.residual + e.at, e.lo, e.hi, bytes);
    }
  } else if constexpr (is_trained_group(FORMAT)) {
    fold_group<WHOLE, FORMAT>(pass, e, group, w, stochastic, random, last, keep);
  }
}

}  // namespace zo_cuda

#endif
