// Storage formats on a CPU: stages between the bytes of one tile and its float32 values in L1; see cpu_tile.h.
//
// A tile's planes are pointers to its first element's bytes, in place or copied. Stages run over n elements, n a
// multiple of 128, so over whole groups; what lies beside the parameter's elements in a cut tile is zero.
#ifndef ZO_CPU_FORMATS_H
#define ZO_CPU_FORMATS_H
#include "cpu_work.h"

namespace {

const int TILE = 1024;              // elements
const int ALIGN = 128;              // tiles start at a multiple of this element index: whole blocks of every stream
const int MAX_GROUPS = TILE / 16;   // of a tile

const float NF4[16] = ZO_NF4_VALUES, E2M1[16] = ZO_E2M1_VALUES, FP4[16] = ZO_FP4_VALUES;

struct Planes {
  zo_u8 *values, *scales, *minima, *residual;
};

// The scales of a tile's groups, between the updates of one pass.
struct Grid {
  int group;
  float middle;  // int4: what its codes count from
  float scale[MAX_GROUPS], minimum[MAX_GROUPS];
  zo_u8 exponent[MAX_GROUPS];  // instead of `scale`, for fp8
  alignas(64) zo_u8 each[TILE];  // of elements, for mxfp4_across
};

inline void load_grid(int format, const Planes& p, Grid& grid, int n) {
  const int count = n / grid.group;
  if (zo_scale_bytes(format) == 1)
    __builtin_memcpy(grid.exponent, p.scales, count);
  else
    __builtin_memcpy(grid.scale, p.scales, 4 * count);
  if (!zo_own_minimum_bytes(format)) return;
  if (zo_own_minimum_bytes(format) == 4) {
    __builtin_memcpy(grid.minimum, p.minima, 4 * count);
    return;
  }
  for (int k = 0; k < count; ++k) {
    zo_u16 half;
    __builtin_memcpy(&half, p.minima + 2 * k, 2);
    grid.minimum[k] = ZoScalar::value((zo_u32)half << 16);
  }
}

// mxfp4_across: the exponents of elements [begin, end) of a tile whose first lies `at` elements after a band's.
inline void load_across(const zo_u8* scales, zo_u32 across, zo_u64 at, int begin, int end, Grid& grid) {
  __builtin_memset(grid.each, 0, sizeof grid.each);
  for (int i = begin; i < end;) {
    const zo_u64 from = zo_across_scale(at + i, across);
    const int left = (int)(across - from % across), count = left < end - i ? left : end - i;
    __builtin_memcpy(grid.each + i, scales + from, count);
    i += count;
  }
}

// nvfp4_two: the scales of a tile's groups that hold elements [begin, end); the first lies `at` after the planes' first.
inline void load_two(const float* wholes, zo_u64 at, int begin, int end, Grid& grid) {
  const int last = (end + 15) / 16;
  for (int k = begin / 16; k < last;) {
    const zo_u64 from = at + 16 * k;
    const int left = (int)(ZO_TWO - from % ZO_TWO) / 16, stop = left < last - k ? k + left : last;
    const float whole = wholes[from / ZO_TWO];
    for (; k < stop; ++k)  // half floats have 8 less exponent bias
      grid.scale[k] = zo_two_scale(
          zo_fp16_decode<ZoScalar>(zo_e4m3_half<ZoScalar>(grid.exponent[k]) & 0xffffu) * 256.0f, whole);
  }
}

inline void store_grid(int format, const Grid& grid, const Planes& p, int n) {
  const int count = n / grid.group;
  if (zo_scale_bytes(format) == 1)
    __builtin_memcpy(p.scales, grid.exponent, count);
  else
    __builtin_memcpy(p.scales, grid.scale, 4 * count);
  if (!zo_minimum_bytes(format)) return;
  for (int k = 0; k < count; ++k) {
    const zo_u16 half = (zo_u16)(ZoScalar::bits(grid.minimum[k]) >> 16);
    __builtin_memcpy(p.minima + 2 * k, &half, 2);
  }
}

// ---- codes of 8 bits, made from value / scale; V::Words: as many 16-bit lanes as V has elements

template <class V>
struct E4M3 {
  typedef typename V::U U;
  typedef typename V::F F;
  static ZO_HD U round(F x) { return zo_e4m3_round<V>(x); }
  static ZO_HD U round(F x, U r) { return zo_e4m3_round_stochastic<V>(x, r); }
  static ZO_HD F number(U code) { return V::half_value(zo_e4m3_half<V>(code)); }
  static ZO_HD F read(const zo_u8* p) {
    return V::Words::half_value(zo_e4m3_half_of_signed<typename V::Words>(V::Words::load8_signed(p)));
  }
};

template <class V>
struct E5M2 {
  typedef typename V::U U;
  typedef typename V::F F;
  static ZO_HD U round(F x) { return zo_e5m2_round<V>(x); }
  static ZO_HD U round(F x, U r) { return zo_e5m2_round_stochastic<V>(x, r); }
  static ZO_HD F number(U code) { return V::half_value(zo_e5m2_half<V>(code)); }
  static ZO_HD F read(const zo_u8* p) {
    return V::Words::half_value(zo_e5m2_half<typename V::Words>(V::Words::load8_signed(p)));
  }
};

template <class V>
struct Int8 {
  typedef typename V::U U;
  typedef typename V::F F;
  static ZO_HD U round(F x) { return zo_int8_round<V>(x); }
  static ZO_HD U round(F x, U r) { return zo_int8_round_stochastic<V>(x, r); }
  static ZO_HD F number(U code) { return zo_int8_number<V>(code); }
  static ZO_HD F read(const zo_u8* p) { return number(V::load8(p)); }
};

template <class V>
struct Fp8Master : E4M3<V> {  // of 16 bits; `factor` of a master is that of its coarse code / 256, in both formats
  typedef typename V::U U;
  typedef typename V::F F;
  static ZO_HD U round(F x) { return zo_fp8_master<V>(x); }
  static ZO_HD U round(F x, U r) { return zo_fp8_master_stochastic<V>(x, r); }
  static ZO_HD F master_number(U code) { return zo_fp8_master_value<V>(code); }
};

template <class V>
struct Int8Master : Int8<V> {
  typedef typename V::U U;
  typedef typename V::F F;
  static ZO_HD U round(F x) { return zo_int16_round<V>(x); }
  static ZO_HD U round(F x, U r) { return zo_int16_round_stochastic<V>(x, r); }
  static ZO_HD F master_number(U code) { return zo_int16_number<V>(code); }
};

template <class V, class Codec>
ZO_HD void decode_bytes(const zo_u8* values, float factor, float* w, int n) {
  const typename V::F f = V::f(factor);
  for (int i = 0; i < n; i += V::WIDTH) V::store(w + i, V::mul(Codec::read(values + i), f));
}

template <class V, class Codec>
ZO_HD void join_bytes(const zo_u8* values, const zo_u8* residual, float factor, float* w, int n) {
  const typename V::F f = V::f(factor * 0.00390625f);
  for (int i = 0; i < n; i += V::WIDTH)
    V::store(w + i, V::mul(Codec::master_number(zo_join<V, 8>(V::load8(values + i), V::load8(residual + i))), f));
}

template <class V, class Codec>
ZO_HD void encode_bytes(zo_u8* values, float inverse, float factor, float* w, int n, const zo_u16* random) {
  const typename V::F f = V::f(factor);
  for (int i = 0; i < n; i += V::WIDTH) {
    const typename V::F x = zo_scaled<V>(V::load(w + i), inverse);
    const typename V::U code = random ? Codec::round(x, V::load16(random + i)) : Codec::round(x);
    V::store8(values + i, code);
    V::store(w + i, V::mul(Codec::number(code), f));
  }
}

// inverse: of a master's step. w becomes the coarse value if this is the last fold, else the master's.
template <class V, class Codec>
ZO_HD void split_bytes(zo_u8* values, zo_u8* residual, float inverse, float factor, float* w, int n,
                       const zo_u16* random, bool last) {
  const typename V::F f = V::f(last ? factor : factor * 0.00390625f);
  for (int i = 0; i < n; i += V::WIDTH) {
    const typename V::F x = zo_scaled<V>(V::load(w + i), inverse);
    const typename V::U master = random ? Codec::round(x, V::load16(random + i)) : Codec::round(x);
    const typename V::U coarse = V::and_(zo_coarse<V, 8>(master), V::u(0xff));
    V::store8(values + i, coarse);
    V::store8(residual + i, master);
    V::store(w + i, V::mul(last ? Codec::number(coarse) : Codec::master_number(master), f));
  }
}

// ---- stages

template <class V>
zo_u32 largest_bits(const float* w, int n) {
  typename V::U most = V::u(0);
  for (int i = 0; i < n; i += V::WIDTH) most = V::most_u(most, zo_magnitude<V>(V::load(w + i)));
  zo_u32 each[V::WIDTH], found = 0;
  V::store_bits(each, most);
  for (int i = 0; i < V::WIDTH; ++i) found = each[i] > found ? each[i] : found;
  return found;
}

template <class V>
int count_not_finite(const float* w, int n) {
  typename V::U count = V::u(0);
  for (int i = 0; i < n; i += V::WIDTH)
    count = V::add_u(count, V::select_less(zo_magnitude<V>(V::load(w + i)), V::u(0x7f800000u), V::u(0), V::u(1)));
  zo_u32 each[V::WIDTH];
  int found = 0;
  V::store_bits(each, count);
  for (int i = 0; i < V::WIDTH; ++i) found += (int)each[i];
  return found;
}

// factors of the codes of group k: number * factor, value * inverse (of a master's step, if split)
inline float factor_of(int format, const Grid& grid, int k) {
  if (format == ZO_MXFP4) return zo_mx_factor(grid.exponent[k]);
  if (format == ZO_FP8F) return zo_fp8f_factor(grid.scale[k]);
  return zo_scale_bytes(format) == 1 ? zo_fp8_factor(format, grid.exponent[k]) : grid.scale[k];
}

inline float inverse_of(int format, const Grid& grid, int k) {
  if (zo_scale_bytes(format) == 1) return zo_fp8_inverse(grid.exponent[k]);
  return zo_inverse(format == ZO_INT8_8 ? grid.scale[k] * 0.00390625f : grid.scale[k]);
}

template <class V>
ZO_HD void decode_table(const float* table, const zo_u8* values, float factor, float* w, int at, int n) {
  const typename V::F f = V::f(factor);
  for (int i = at; i < at + n; i += V::WIDTH) V::store(w + i, V::mul(V::lookup(table, V::load4(values, i)), f));
}

template <class V>
void decode_group(int format, const Planes& p, const Grid& grid, int k, float* w) {
  const int n = grid.group, at = k * n;
  switch (format) {
    case ZO_FP8_E5M2: return decode_bytes<V, E5M2<V>>(p.values + at, factor_of(format, grid, k), w + at, n);
    case ZO_FP8_E4M3:
    case ZO_FP8F:
    case ZO_FP8_8: return decode_bytes<V, E4M3<V>>(p.values + at, factor_of(format, grid, k), w + at, n);
    case ZO_INT8:
    case ZO_INT8_8: return decode_bytes<V, Int8<V>>(p.values + at, grid.scale[k], w + at, n);
    case ZO_INT8_127: {
      const typename V::F scale = V::f(grid.scale[k]), inverse = V::f(ZO_INVERSE_127);
      for (int i = at; i < at + n; i += V::WIDTH)
        V::store(w + i, V::mul(V::mul(Int8<V>::read(p.values + i), scale), inverse));
      return;
    }
    case ZO_INT8F: {
      const typename V::F scale = V::f(grid.scale[k]), minimum = V::f(grid.minimum[k]);
      for (int i = at; i < at + n; i += V::WIDTH)
        V::store(w + i, V::fma(V::to_float(V::load8(p.values + i)), scale, minimum));
      return;
    }
    case ZO_INT4F:
    case ZO_INT4: {
      const typename V::F scale = V::f(grid.scale[k]), minimum = V::f(grid.minimum[k]), less = V::f(-grid.middle);
      for (int i = at; i < at + n; i += V::WIDTH)
        V::store(w + i, V::fma(V::add(V::to_float(V::load4(p.values, i)), less), scale, minimum));
      return;
    }
    case ZO_NVFP4_TWO: return decode_table<V>(E2M1, p.values, grid.scale[k], w, at, n);
    case ZO_MXFP4:
    case ZO_NVFP4: return decode_table<V>(E2M1, p.values, factor_of(format, grid, k), w, at, n);
    case ZO_FP4: return decode_table<V>(FP4, p.values, grid.scale[k], w, at, n);
    default: decode_table<V>(NF4, p.values, grid.scale[k], w, at, n);
  }
}

// w = what lanes see
template <class V>
__attribute__((noinline)) void decode(int format, const Planes& p, const Grid& grid, float* w, int n) {
  const zo_u8* stored = p.values;
  switch (format) {
    case ZO_FP32:
      for (int i = 0; i < n; i += V::WIDTH) V::store(w + i, V::load((const float*)stored + i));
      return;
    case ZO_BF16:
    case ZO_BF16_16:
    case ZO_BF16_8:
      for (int i = 0; i < n; i += V::WIDTH) V::store(w + i, V::value(V::template shl<16>(V::load16(stored + 2 * i))));
      return;
    case ZO_FP16:
      for (int i = 0; i < n; i += V::WIDTH) V::store(w + i, V::half_value(V::load16(stored + 2 * i)));
      return;
    case ZO_MXFP4_ACROSS:
      for (int i = 0; i < n; i += V::WIDTH)
        V::store(w + i, V::mul(V::lookup(E2M1, V::load4(stored, i)), zo_mx_factors<V>(V::load8(grid.each + i))));
      return;
    default:
      for (int k = 0; k < n / grid.group; ++k) decode_group<V>(format, p, grid, k, w);
  }
}

// w = the master of a split format
template <class V>
__attribute__((noinline)) void join(int format, const Planes& p, const Grid& grid, float* w, int n) {
  if (format == ZO_BF16_16) {
    for (int i = 0; i < n; i += V::WIDTH)
      V::store(w + i, V::value(zo_join<V, 16>(V::load16(p.values + 2 * i), V::load16(p.residual + 2 * i))));
  } else if (format == ZO_BF16_8) {
    for (int i = 0; i < n; i += V::WIDTH) {
      const typename V::U master = zo_join<V, 8>(V::load16(p.values + 2 * i), V::load8(p.residual + i));
      V::store(w + i, V::value(V::template shl<8>(master)));
    }
  } else {
    const int group = grid.group;
    for (int k = 0, i = 0; i < n; ++k, i += group) {
      if (format == ZO_FP8_8)
        join_bytes<V, Fp8Master<V>>(p.values + i, p.residual + i, factor_of(format, grid, k), w + i, group);
      else
        join_bytes<V, Int8Master<V>>(p.values + i, p.residual + i, grid.scale[k], w + i, group);
    }
  }
}

template <class V>
void encode_group(int format, const Planes& p, Grid& grid, int k, float* w, const zo_u16* random, bool last) {
  const int n = grid.group, at = k * n;
  w += at;
  if (random) random += at;
  const zo_u32 largest = largest_bits<V>(w, n);
  if (zo_scale_bytes(format) == 1)
    grid.exponent[k] = (zo_u8)zo_fp8_exponent(largest, zo_fp8_top(format));
  else
    grid.scale[k] = zo_int8_scale(largest, grid.scale[k]);
  const float inverse = inverse_of(format, grid, k), factor = factor_of(format, grid, k);
  switch (format) {
    case ZO_FP8_E4M3: return encode_bytes<V, E4M3<V>>(p.values + at, inverse, factor, w, n, random);
    case ZO_FP8_E5M2: return encode_bytes<V, E5M2<V>>(p.values + at, inverse, factor, w, n, random);
    case ZO_INT8: return encode_bytes<V, Int8<V>>(p.values + at, inverse, factor, w, n, random);
    case ZO_FP8_8:
      return split_bytes<V, Fp8Master<V>>(p.values + at, p.residual + at, inverse, factor, w, n, random, last);
    default:
      return split_bytes<V, Int8Master<V>>(p.values + at, p.residual + at, inverse, factor, w, n, random, last);
  }
}

template <class V>
void split_bf16(int format, const Planes& p, float* w, int n, const zo_u16* random, bool last) {
  typedef typename V::U U;
  const int W = V::WIDTH;
  // the master, as the bits of a float32
  auto master = [&](int i) {
    const typename V::F x = V::load(w + i);
    if (format == ZO_BF16_16) return zo_fp32_round<V>(x);
    return V::template shl<8>(random ? zo_bf24_round_stochastic<V>(x, V::load16(random + i)) : zo_bf24_round<V>(x));
  };
  for (int i = 0; i < n; i += 2 * W) {
    U m[2] = {master(i), master(i + W)}, coarse[2];
    for (int j = 0; j < 2; ++j) {
      coarse[j] = V::add_u(m[j], V::u(0x8000));  // rounded, in the upper half
      if (format == ZO_BF16_8) V::store8(p.residual + i + j * W, V::template shr<8>(m[j]));
      V::store(w + i + j * W, last ? zo_bf16_value<V>(coarse[j]) : V::value(m[j]));
    }
    V::store_bits(p.values + 2 * i, V::pack_upper16(coarse[0], coarse[1]));
    if (format == ZO_BF16_16)
      V::store_bits(p.residual + 2 * i, V::pack16(V::and_(m[0], V::u(0xffff)), V::and_(m[1], V::u(0xffff))));
  }
}

// stored = encode(w), w = decode(stored); of a split format, the master's value but for the last fold of a pass.
// random: 16 bits an element, or null to round to nearest
template <class V>
__attribute__((noinline)) void encode(int format, const Planes& p, Grid& grid, float* w, int n, const zo_u16* random,
                                      bool last) {
  typedef typename V::U U;
  const int W = V::WIDTH;
  zo_u8* stored = p.values;
  if (zo_scale_bytes(format)) {
    for (int k = 0; k < n / grid.group; ++k) encode_group<V>(format, p, grid, k, w, random, last);
  } else if (format == ZO_FP32) {
    for (int i = 0; i < n; i += W) {
      typename V::F x = V::value(zo_fp32_round<V>(V::load(w + i)));
      V::store(w + i, x);
      V::store((float*)stored + i, x);
    }
  } else if (format == ZO_BF16) {
    auto finish = [&](int i, U a, U b) {
      V::store_bits(stored + 2 * i, V::pack_upper16(a, b));
      V::store(w + i, zo_bf16_value<V>(a));
      V::store(w + i + W, zo_bf16_value<V>(b));
    };
    if (random)
      for (int i = 0; i < n; i += 2 * W)
        finish(i, zo_bf16_round_stochastic<V>(V::load(w + i), V::load16(random + i)),
               zo_bf16_round_stochastic<V>(V::load(w + i + W), V::load16(random + i + W)));
    else
      for (int i = 0; i < n; i += 2 * W)
        finish(i, zo_bf16_round<V>(V::load(w + i)), zo_bf16_round<V>(V::load(w + i + W)));
  } else if (format == ZO_FP16) {
    auto finish = [&](int i, U a, U b) {
      V::store_bits(stored + 2 * i, V::pack16(a, b));
      V::store(w + i, V::half_value(a));
      V::store(w + i + W, V::half_value(b));
    };
    if (random)
      for (int i = 0; i < n; i += 2 * W)
        finish(i, zo_fp16_round_stochastic<V>(V::load(w + i), V::load16(random + i)),
               zo_fp16_round_stochastic<V>(V::load(w + i + W), V::load16(random + i + W)));
    else
      for (int i = 0; i < n; i += 2 * W) finish(i, V::half_round(V::load(w + i)), V::half_round(V::load(w + i + W)));
  } else {
    split_bf16<V>(format, p, w, n, random, last);
  }
}

// Formats that are encoded once: the tile's values before `end`, the rest being padding.
template <class V>
void encode_four_bits(int format, const Planes& p, Grid& grid, float* w, int n, int end) {
  zo_u32 codes[TILE];
  for (int k = 0; k < n / grid.group; ++k) {
    const int at = k * grid.group, stop = end < at + grid.group ? end : at + grid.group;
    const zo_u32 largest = largest_bits<V>(w + at, grid.group);
    float least = 0.0f;  // int4: the value of code 0
    if (format == ZO_INT4) {
      float low = 0.0f, high = 0.0f;
      if (at < stop && largest < 0x7f800000u) {
        low = high = w[at];
        for (int i = at; i < stop; ++i) low = ZoScalar::least(low, w[i]), high = ZoScalar::most(high, w[i]);
      }
      zo_int4_grid found = zo_int4_make_grid(largest, low, high);
      grid.scale[k] = found.scale;
      grid.minimum[k] = grid.middle != 0.0f ? zo_int4_centre(found) : found.minimum;
      least = grid.middle != 0.0f ? ZoScalar::fma(-7.5f, found.scale, grid.minimum[k]) : found.minimum;
    } else {
      grid.scale[k] = zo_nf4_scale(largest);
    }
    const float inverse = zo_inverse(grid.scale[k]);
    for (int i = at; i < at + grid.group; i += V::WIDTH) {
      const typename V::F x = V::load(w + i);
      V::store_bits(codes + i, format == ZO_INT4 ? zo_int4_round<V>(x, least, inverse)
                                                 : zo_nf4_round<V>(x, inverse));
    }
    for (int i = stop; i < at + grid.group; ++i) codes[i] = 0;  // after the parameter's end
  }
  for (int i = 0; i < n; i += 2) p.values[i / 2] = (zo_u8)(codes[i] | codes[i + 1] << 4);
}

}  // namespace

#endif
