// The fused pass on a CPU: one tile of 1024 float32 in L1, a stage at a time, written once for every vector width.
//
//   decode -> each update: noise added, then rounded -> store -> each lane: noise added, rounded, stored
//
// Stages cost a few L1 accesses an element, and keep formats x distributions x roundings x lanes from multiplying
// into hundreds of kernels; measured faster than one fused loop as well. A tile that starts inside a Philox block or
// ends inside a vector goes through bounce buffers, so the stages themselves only know whole blocks.
//
// Included by one translation unit per instruction set, inside its anonymous namespace: nothing here may be shared by
// the linker between units built with different flags. For the same reason no standard headers.
#include "cpu_work.h"

namespace {

const int TILE = 1024;   // elements
const int ALIGN = 128;   // tiles start at a multiple of this element index: whole blocks of every stream

template <class V, int N>
struct Wide {  // N vectors side by side, so that N dependent chains overlap; a backend like V
  struct U {
    typename V::U v[N];
  };
  struct F {
    typename V::F v[N];
  };
#define ZO_EACH(T, expression) \
  T out;                       \
  ZO_UNROLL                    \
  for (int i = 0; i < N; ++i) out.v[i] = expression; \
  return out;
  static ZO_HD U u(zo_u32 x) { ZO_EACH(U, V::u(x)) }
  static ZO_HD F f(float x) { ZO_EACH(F, V::f(x)) }
  static ZO_HD U or_(U a, U b) { ZO_EACH(U, V::or_(a.v[i], b.v[i])) }
  static ZO_HD U and_(U a, U b) { ZO_EACH(U, V::and_(a.v[i], b.v[i])) }
  static ZO_HD U xor_(U a, U b) { ZO_EACH(U, V::xor_(a.v[i], b.v[i])) }
  static ZO_HD U sub_u(U a, U b) { ZO_EACH(U, V::sub_u(a.v[i], b.v[i])) }
  template <int S> static ZO_HD U shl(U a) { ZO_EACH(U, V::template shl<S>(a.v[i])) }
  template <int S> static ZO_HD U shr(U a) { ZO_EACH(U, V::template shr<S>(a.v[i])) }
  static ZO_HD F fma(F a, F b, F c) { ZO_EACH(F, V::fma(a.v[i], b.v[i], c.v[i])) }
  static ZO_HD F mul(F a, F b) { ZO_EACH(F, V::mul(a.v[i], b.v[i])) }
  static ZO_HD F add(F a, F b) { ZO_EACH(F, V::add(a.v[i], b.v[i])) }
  static ZO_HD F sqrt(F a) { ZO_EACH(F, V::sqrt(a.v[i])) }
  static ZO_HD F to_float(U a) { ZO_EACH(F, V::to_float(a.v[i])) }
  static ZO_HD U bits(F a) { ZO_EACH(U, V::bits(a.v[i])) }
  static ZO_HD F value(U a) { ZO_EACH(F, V::value(a.v[i])) }
#undef ZO_EACH
};

// Philox of G groups of V::BLOCKS consecutive blocks, one block a 64-bit SIMD lane, so that the 32 x 32 -> 64 bit
// multiply needs no shuffles. Word j of each block is the low half of its lane in c[j]; upper halves are rubbish.
template <class V, int R, int G>
ZO_HD void philox_groups(const zo_key& key, zo_u64 block, typename V::U (&c0)[G], typename V::U (&c1)[G],
                         typename V::U (&c2)[G], typename V::U (&c3)[G]) {
  typedef typename V::U U;
  const U m0 = V::u64(ZO_PHILOX_M0), m1 = V::u64(ZO_PHILOX_M1);
  const zo_u64 first = (zo_u64)ZO_PHILOX_M1 * key.param_id;
  const U k0 = V::u64(key.k0[0] ^ (first >> 32)), k1 = V::u64(key.k1[0] ^ key.tag), low = V::u64(first);
  ZO_UNROLL
  for (int g = 0; g < G; ++g) {  // round 0: words 2 and 3 are the same in all lanes
    U b = V::add64(V::u64(block + V::BLOCKS * g), V::lanes());
    U p0 = V::mul64(m0, b);
    c0[g] = V::xor_(V::upper(b), k0);
    c2[g] = V::xor_(V::upper(p0), k1);
    c1[g] = low;
    c3[g] = p0;
  }
  ZO_UNROLL
  for (int r = 1; r < R; ++r) {
    ZO_UNROLL
    for (int g = 0; g < G; ++g) {
      U p0 = V::mul64(m0, c0[g]), p1 = V::mul64(m1, c2[g]);
      c0[g] = V::xor3(V::upper(p1), c1[g], V::u64(key.k0[r]));
      c2[g] = V::xor3(V::upper(p0), c3[g], V::u64(key.k1[r]));
      c1[g] = p1;
      c3[g] = p0;
    }
  }
}

template <class V, int R, int G, class Sink>
ZO_HD void vector_gaussian(const zo_key& key, zo_u64 g, int n, Sink sink) {
  typedef typename V::U U;
  for (int i = 0; i < n; i += 4 * V::BLOCKS * G) {
    U c0[G], c1[G], c2[G], c3[G];
    philox_groups<V, R, G>(key, (g + i) >> 2, c0, c1, c2, c3);
    typename Wide<V, G>::U a, b;
    typename Wide<V, G>::F x, y;
    ZO_UNROLL
    for (int k = 0; k < G; ++k) {
      a.v[k] = V::merge(c0[k], c2[k]);
      b.v[k] = V::merge(c1[k], c3[k]);
    }
    zo_gaussian_pair<Wide<V, G>>(a, b, x, y);
    ZO_UNROLL
    for (int k = 0; k < G; ++k) {
      sink(i + 2 * V::WIDTH * k, V::zip_low(x.v[k], y.v[k]));
      sink(i + 2 * V::WIDTH * k + V::WIDTH, V::zip_high(x.v[k], y.v[k]));
    }
  }
}

// z of elements [g, g + n), both multiples of ALIGN, handed to sink(i, vector) in order.
template <class V, int R, class Sink>
ZO_HD void gaussian(const zo_key& key, zo_u64 g, int n, Sink sink) {
  if constexpr (V::WIDTH == 1) {
    for (int i = 0; i < n; i += 4) {
      float z[4];
      zo_gaussian_block<R>((g + i) >> 2, key.param_id, key.k0[0] | key.k1[0] << 32, z);
      for (int j = 0; j < 4; ++j) sink(i + j, z[j]);
    }
  } else {
    vector_gaussian<V, R, V::GROUPS>(key, g, n, sink);
  }
}

// Words of `count` blocks in memory order; writes up to a whole number of groups.
template <class V, int R, int G>
ZO_HD void philox_words(const zo_key& key, zo_u64 block, int count, zo_u32* out) {
  if constexpr (V::WIDTH == 1) {
    for (int i = 0; i < count; ++i) {
      zo_words w = zo_philox<R>(block + i, key.param_id, key.tag, key.k0[0] | key.k1[0] << 32);
      __builtin_memcpy(out + 4 * i, w.w, 16);
    }
  } else {
    for (int i = 0; i < count; i += V::BLOCKS * G) {
      typename V::U c0[G], c1[G], c2[G], c3[G];
      philox_groups<V, R, G>(key, block + i, c0, c1, c2, c3);
      ZO_UNROLL
      for (int k = 0; k < G; ++k) V::store_blocks(out + 4 * (i + V::BLOCKS * k), c0[k], c1[k], c2[k], c3[k]);
    }
  }
}

// ---- stages over n elements, n a multiple of ALIGN

template <class V>
void decode(int format, const zo_u8* stored, float* w, int n) {
  if (format == ZO_FP32)
    for (int i = 0; i < n; i += V::WIDTH) V::store(w + i, V::load((const float*)stored + i));
  else if (format == ZO_BF16)
    for (int i = 0; i < n; i += V::WIDTH) V::store(w + i, V::value(V::template shl<16>(V::load16(stored + 2 * i))));
  else
    for (int i = 0; i < n; i += V::WIDTH) V::store(w + i, V::half_value(V::load16(stored + 2 * i)));
}

// stored = encode(w), w = decode(stored); `random`: 16 bits an element, or null to round to nearest
template <class V>
void encode(int format, zo_u8* stored, float* w, int n, const zo_u16* random) {
  typedef typename V::U U;
  const int W = V::WIDTH;
  if (format == ZO_FP32)
    for (int i = 0; i < n; i += W) {
      typename V::F x = V::value(zo_fp32_round<V>(V::load(w + i)));
      V::store(w + i, x);
      V::store((float*)stored + i, x);
    }
  else if (format == ZO_BF16) {
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
  } else {
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
  }
}

template <class V, bool PAST_CACHE>
ZO_HD void put(void* p, typename V::U x) {
  if constexpr (PAST_CACHE)
    V::store_past_cache(p, x);
  else
    V::store_bits(p, x);
}

// out = round(value(i)) for i in steps of one vector
template <class V, bool PAST_CACHE, class Value>
ZO_HD void emit(int format, zo_u8* out, int n, Value value) {
  const int W = V::WIDTH;
  if (format == ZO_FP32)
    for (int i = 0; i < n; i += W) put<V, PAST_CACHE>(out + 4 * i, zo_fp32_round<V>(value(i)));
  else if (format == ZO_BF16)
    for (int i = 0; i < n; i += 2 * W)
      put<V, PAST_CACHE>(out + 2 * i, V::pack_upper16(zo_bf16_round<V>(value(i)), zo_bf16_round<V>(value(i + W))));
  else
    for (int i = 0; i < n; i += 2 * W)
      put<V, PAST_CACHE>(out + 2 * i, V::pack16(V::half_round(value(i)), V::half_round(value(i + W))));
}

// Noise of one seed over one tile, ready to be added to several outputs.
struct Noise {
  alignas(64) float z[TILE];           // gaussian
  alignas(64) zo_u32 signs[TILE / 32];  // rademacher: a bit an element
};

template <class V, int R>
__attribute__((noinline)) void make_noise(const zo_key& key, zo_u64 g, int n, Noise& noise) {
  if (key.tag == ZO_TAG_GAUSSIAN)
    gaussian<V, R>(key, g, n, [&](int i, typename V::F z) { V::store(noise.z + i, z); });
  else
    philox_words<V, R, 1>(key, g >> 7, n / 128, noise.signs);
}

template <class V, int R>
__attribute__((noinline)) void update(float* w, const zo_update& u, const zo_key& key, zo_u64 g, int n, Noise& noise) {
  if (u.decay != 1.0f) {
    const typename V::F decay = V::f(u.decay);
    for (int i = 0; i < n; i += V::WIDTH) V::store(w + i, V::mul(V::load(w + i), decay));
  }
  if (u.coeff == 0.0f) return;
  const typename V::F scale = V::f(-u.coeff);
  if (key.tag == ZO_TAG_GAUSSIAN) {
    gaussian<V, R>(key, g, n, [&](int i, typename V::F z) {
      V::store(w + i, zo_add_noise<V>(V::load(w + i), scale, z));
    });
  } else {
    philox_words<V, R, 1>(key, g >> 7, n / 128, noise.signs);
    for (int i = 0; i < n; i += V::WIDTH) V::store(w + i, V::add_signed(V::load(w + i), scale, noise.signs, i));
  }
}

template <class V, bool PAST_CACHE>
__attribute__((noinline)) void lane(const float* w, const Noise& noise, int tag, float scale, int format, zo_u8* out,
                                    int n) {
  const typename V::F s = V::f(scale);
  if (scale == 0.0f)
    emit<V, PAST_CACHE>(format, out, n, [&](int i) { return V::load(w + i); });
  else if (tag == ZO_TAG_GAUSSIAN)
    emit<V, PAST_CACHE>(format, out, n,
                        [&](int i) { return zo_add_noise<V>(V::load(w + i), s, V::load(noise.z + i)); });
  else
    emit<V, PAST_CACHE>(format, out, n, [&](int i) { return V::add_signed(V::load(w + i), s, noise.signs, i); });
}

// ---- one run of consecutive elements

template <class V, int R>
void segment(const zo_work* work, zo_u8* stored, zo_u64 g, zo_u64 n, zo_u64 out_at) {
  alignas(64) float w[TILE];
  alignas(64) zo_u16 random[TILE];
  alignas(64) zo_u8 scratch[TILE * 4], bounce[TILE * 4];
  Noise noise;
  const zo_pass& pass = *work->pass;
  const int format = (int)pass.format, size = zo_format_bytes(format);
  const bool write_back = pass.flags & ZO_WRITE_BACK, stochastic = pass.flags & ZO_STOCHASTIC;
  while (n) {
    const int head = (int)(g & (ALIGN - 1));
    const int count = n < (zo_u64)(TILE - head) ? (int)n : TILE - head;
    const int span = (head + count + ALIGN - 1) & ~(ALIGN - 1);
    const zo_u64 first = g - head;
    const bool whole = span == count;
    zo_u8* bytes = stored;
    if (!whole) {
      bytes = bounce;
      __builtin_memset(bounce, 0, (zo_u64)span * size);
      __builtin_memcpy(bounce + head * size, stored, (zo_u64)count * size);
    }
    decode<V>(format, bytes, w, span);
    for (zo_u32 k = 0; k < pass.num_updates; ++k) {
      update<V, R>(w, work->updates[k], work->update_keys[k], first, span, noise);
      if (!(work->updates[k].flags & ZO_UPDATE_FOLD)) continue;
      if (stochastic && format != ZO_FP32)
        philox_words<V, R, V::GROUPS>(work->rounding_keys[k], first >> 3, span / 8, (zo_u32*)random);
      const bool keep = write_back && (int)k == work->last_fold;
      encode<V>(format, keep ? bytes : scratch, w, span, stochastic ? random : 0);
      if (keep && !whole) __builtin_memcpy(stored, bounce + head * size, (zo_u64)count * size);
    }
    for (zo_u32 j = 0; j < pass.num_lanes; ++j) {
      const zo_lane& l = work->lanes[j];
      if (work->lane_keys[j].fresh) make_noise<V, R>(work->lane_keys[j], first, span, noise);
      const int out_size = zo_format_bytes((int)l.format);
      zo_u8* out = (zo_u8*)l.out + out_at * out_size;
      if (!whole) {
        lane<V, false>(w, noise, work->tag, l.scale, (int)l.format, scratch, span);
        __builtin_memcpy(out, scratch + head * out_size, (zo_u64)count * out_size);
      } else if (work->past_cache && ((zo_u64)out & 63) == 0) {
        lane<V, true>(w, noise, work->tag, l.scale, (int)l.format, out, span);
      } else {
        lane<V, false>(w, noise, work->tag, l.scale, (int)l.format, out, span);
      }
    }
    stored += (zo_u64)count * size;
    g += count;
    out_at += count;
    n -= count;
  }
}

template <class V, int R>
void noise_segment(const zo_key* key, zo_u64 g, zo_u64 n, float* out) {
  Noise noise;
  alignas(64) float w[TILE];
  for (int i = 0; i < TILE; ++i) w[i] = 0.0f;
  while (n) {
    const int head = (int)(g & (ALIGN - 1));
    const int count = n < (zo_u64)(TILE - head) ? (int)n : TILE - head;
    const int span = (head + count + ALIGN - 1) & ~(ALIGN - 1);
    make_noise<V, R>(*key, g - head, span, noise);
    if (key->tag == ZO_TAG_RADEMACHER)  // 0 + 1 * sign
      for (int i = 0; i < span; i += V::WIDTH)
        V::store(noise.z + i, V::add_signed(V::load(w + i), V::f(1.0f), noise.signs, i));
    __builtin_memcpy(out, noise.z + head, (zo_u64)count * 4);
    out += count;
    g += count;
    n -= count;
  }
}

template <class V>
zo_kernels kernels() {
  zo_kernels k = {{segment<V, 7>, segment<V, 10>}, {noise_segment<V, 7>, noise_segment<V, 10>}};
  return k;
}

}  // namespace
