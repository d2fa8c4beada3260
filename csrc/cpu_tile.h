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
#include "cpu_ahead.h"
#include "cpu_formats.h"

namespace {

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

// V::Word is one word of each of V::BLOCKS blocks, V::U as many products of two words, a block a 64-bit lane. With AVX a
// word is the low half of such a lane, and upper halves are rubbish; with NEON words lie side by side.

// Rounds FROM..TO-1 of Philox.
template <class V, int FROM, int TO, int G>
ZO_HD void philox_rounds(const zo_key& key, typename V::Word (&c0)[G], typename V::Word (&c1)[G],
                         typename V::Word (&c2)[G], typename V::Word (&c3)[G]) {
  typedef typename V::U U;
  const typename V::Word m0 = V::word(ZO_PHILOX_M0), m1 = V::word(ZO_PHILOX_M1);
  ZO_UNROLL
  for (int r = FROM; r < TO; ++r) {
    ZO_UNROLL
    for (int g = 0; g < G; ++g) {
      U p0 = V::mul64(m0, c0[g]), p1 = V::mul64(m1, c2[g]);
      c0[g] = V::xor3(V::upper(p1), c1[g], V::word(key.k0[r]));
      c2[g] = V::xor3(V::upper(p0), c3[g], V::word(key.k1[r]));
      c1[g] = V::lower(p1);
      c3[g] = V::lower(p0);
    }
  }
}

// Philox of G groups of V::BLOCKS consecutive blocks, up to what goes into round R - 1.
//
// In rounds 0 to 2 most of what is multiplied is the same in all lanes (words 2 and 3 of the counter are, and word 1 is
// unless the 2^32-th block lies inside of these), so it is multiplied once, outside of the vectors.
template <class V, int R, int G>
ZO_HD void philox_before_last(const zo_key& key, zo_u64 block, typename V::Word (&c0)[G], typename V::Word (&c1)[G],
                              typename V::Word (&c2)[G], typename V::Word (&c3)[G]) {
  typedef typename V::U U;
  typedef typename V::Word Word;
  const Word m0 = V::word(ZO_PHILOX_M0), m1 = V::word(ZO_PHILOX_M1);
  const zo_u64 first = (zo_u64)ZO_PHILOX_M1 * key.param_id, upper = block >> 32;
  const Word tagged = V::word(key.k1[0] ^ key.tag);
  if (__builtin_expect(((block + V::BLOCKS * G - 1) >> 32) == upper, 1)) {
    const zo_u64 second = (zo_u64)ZO_PHILOX_M0 * (zo_u32)((first >> 32) ^ upper ^ key.k0[0]);
    const Word x0 = V::word((zo_u32)first ^ key.k0[1]), x2 = V::word((second >> 32) ^ key.k1[1]),
               x3 = V::word((zo_u32)second ^ key.k1[2]), k0 = V::word(key.k0[2]);
    ZO_UNROLL
    for (int g = 0; g < G; ++g) {
      U p0 = V::mul64(m0, V::lower(V::add64(V::u64(block + V::BLOCKS * g), V::lanes())));
      c2[g] = V::xor_(V::upper(p0), tagged);
      U p1 = V::mul64(m1, c2[g]);
      c0[g] = V::xor_(V::upper(p1), x0);
      c2[g] = V::xor_(V::lower(p0), x2);
      c1[g] = V::lower(p1);
      p0 = V::mul64(m0, c0[g]);
      p1 = V::mul64(m1, c2[g]);
      c0[g] = V::xor3(V::upper(p1), c1[g], k0);
      c2[g] = V::xor_(V::upper(p0), x3);
      c1[g] = V::lower(p1);
      c3[g] = V::lower(p0);
    }
  } else {
    ZO_UNROLL
    for (int g = 0; g < G; ++g) {
      const U b = V::add64(V::u64(block + V::BLOCKS * g), V::lanes()), p0 = V::mul64(m0, V::lower(b));
      c0[g] = V::xor_(V::upper(b), V::word(key.k0[0] ^ (first >> 32)));
      c2[g] = V::xor_(V::upper(p0), tagged);
      c1[g] = V::word(first);
      c3[g] = V::lower(p0);
    }
    philox_rounds<V, 1, 3, G>(key, c0, c1, c2, c3);
  }
  philox_rounds<V, 3, R - 1, G>(key, c0, c1, c2, c3);
}

// The words of the blocks, word j in c[j].
template <class V, int R, int G>
ZO_HD void philox_groups(const zo_key& key, zo_u64 block, typename V::Word (&c0)[G], typename V::Word (&c1)[G],
                         typename V::Word (&c2)[G], typename V::Word (&c3)[G]) {
  philox_before_last<V, R, G>(key, block, c0, c1, c2, c3);
  philox_rounds<V, R - 1, R, G>(key, c0, c1, c2, c3);
}

// The same words two a lane, 1 and 0 in `a`, 3 and 2 in `b`, the first in the low half.
template <class V, int R, int G>
ZO_HD void philox_pairs(const zo_key& key, zo_u64 block, typename V::U (&a)[G], typename V::U (&b)[G]) {
  typedef typename V::U U;
  typename V::Word c0[G], c1[G], c2[G], c3[G];
  philox_before_last<V, R, G>(key, block, c0, c1, c2, c3);
  const typename V::Word m0 = V::word(ZO_PHILOX_M0), m1 = V::word(ZO_PHILOX_M1);
  const U k0 = V::u64(key.k0[R - 1] << 32), k1 = V::u64(key.k1[R - 1] << 32);
  ZO_UNROLL
  for (int g = 0; g < G; ++g) {
    a[g] = V::xor3(V::mul64(m1, c2[g]), V::lift(c1[g]), k0);
    b[g] = V::xor3(V::mul64(m0, c0[g]), V::lift(c3[g]), k1);
  }
}

template <class V, int R, int G, class Sink>
ZO_HD void vector_box_muller(const zo_key& key, zo_u64 g, int n, Sink sink) {
  for (int i = 0; i < n; i += 4 * V::BLOCKS * G) {
    typename V::Word c0[G], c1[G], c2[G], c3[G];
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

// z of elements [g, g + n), both multiples of ALIGN, handed to sink(i, vector) in order: the Gaussian of layout 1.
template <class V, int R, class Sink>
ZO_HD void box_muller(const zo_key& key, zo_u64 g, int n, Sink sink) {
  if constexpr (V::WIDTH == 1) {
    for (int i = 0; i < n; i += 4) {
      float z[4];
      zo_box_muller_block<R>((g + i) >> 2, key.param_id, key.k0[0] | key.k1[0] << 32, z);
      for (int j = 0; j < 4; ++j) sink(i + j, z[j]);
    }
  } else {
    vector_box_muller<V, R, V::GROUPS>(key, g, n, sink);
  }
}

// Coefficient k of all rows side by side.
struct Rows {
  zo_u32 c[4][16];
};
#define ZO_POWER_0(A, B, C, D) A,
#define ZO_POWER_1(A, B, C, D) B,
#define ZO_POWER_2(A, B, C, D) C,
#define ZO_POWER_3(A, B, C, D) D,
alignas(64) constexpr Rows ROWS = {{{ZO_GAUSSIAN_ROWS(ZO_POWER_0)},
                                    {ZO_GAUSSIAN_ROWS(ZO_POWER_1)},
                                    {ZO_GAUSSIAN_ROWS(ZO_POWER_2)},
                                    {ZO_GAUSSIAN_ROWS(ZO_POWER_3)}}};

// z of 2 vectors of blocks, a block 128 bits, its words in the order 1, 0, 3, 2.
template <class V, class Sink>
ZO_HD void gaussian_blocks(typename V::U words, int i, Sink sink) {
  const typename V::F low = V::gaussian(V::template shl<16>(words)), high = V::gaussian(words);
  sink(i, V::zip128_low(low, high));
  sink(i + V::WIDTH, V::zip128_high(low, high));
}

// z of G groups of V::BLOCKS blocks, 8 elements each.
template <class V, int R, int G, class Sink>
ZO_HD void gaussian_groups(const zo_key& key, zo_u64 block, int i, Sink sink) {
  typename V::U a[G], b[G];
  philox_pairs<V, R, G>(key, block, a, b);
  ZO_UNROLL
  for (int k = 0; k < G; ++k) {
    gaussian_blocks<V>(V::unpack64_low(a[k], b[k]), i + 8 * V::BLOCKS * k, sink);
    gaussian_blocks<V>(V::unpack64_high(a[k], b[k]), i + 8 * V::BLOCKS * k + 2 * V::WIDTH, sink);
  }
}

// As `box_muller`, the Gaussian of layout 2. With 16 registers, all words of a tile come first, by way of L1: words and
// transform would not have room together.
template <class V, int R, class Sink>
ZO_HD void gaussian(const zo_key& key, zo_u64 g, int n, Sink sink) {
  if constexpr (V::WIDTH == 1) {
    for (int i = 0; i < n; i += 8) {
      const zo_words w = zo_philox<R>((g + i) >> 3, key.param_id, key.tag, key.k0[0] | key.k1[0] << 32);
      for (int j = 0; j < 8; ++j) sink(i + j, V::gaussian(w.w[(j & 3) ^ 1] << (16 - 16 * (j >> 2))));
    }
  } else if constexpr (V::REGISTERS == 16) {
    alignas(64) zo_u32 words[TILE / 2];
    enum { G = V::GROUPS, STEP = 8 * V::BLOCKS * G };
    static_assert(ALIGN % STEP == 0, "whole groups");
    for (int i = 0; i < n; i += STEP) {
      typename V::U a[G], b[G];
      philox_pairs<V, R, G>(key, (g + i) >> 3, a, b);
      ZO_UNROLL
      for (int k = 0; k < G; ++k) {
        zo_u32* out = words + i / 2 + 4 * V::BLOCKS * k;
        V::store_bits(out, V::unpack64_low(a[k], b[k]));
        V::store_bits(out + V::WIDTH, V::unpack64_high(a[k], b[k]));
      }
    }
    for (int i = 0; i < n; i += 2 * V::WIDTH) gaussian_blocks<V>(V::load_bits(words + i / 2), i, sink);
  } else {
    enum { STEP = 8 * V::BLOCKS * V::GROUPS };
    static_assert(STEP == 2 * ALIGN, "whole groups, or half of them at the end");
    int i = 0;
    for (; i + STEP <= n; i += STEP) gaussian_groups<V, R, V::GROUPS>(key, (g + i) >> 3, i, sink);
    if (i < n) gaussian_groups<V, R, V::GROUPS / 2>(key, (g + i) >> 3, i, sink);
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
      typename V::Word c0[G], c1[G], c2[G], c3[G];
      philox_groups<V, R, G>(key, block + i, c0, c1, c2, c3);
      ZO_UNROLL
      for (int k = 0; k < G; ++k) V::store_blocks(out + 4 * (i + V::BLOCKS * k), c0[k], c1[k], c2[k], c3[k]);
    }
  }
}

// ---- stages over n elements, n a multiple of ALIGN

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
  alignas(64) float z[TILE];           // of either Gaussian
  alignas(64) zo_u32 signs[TILE / 32];  // rademacher: a bit an element
};

// ---- directions of low rank: z = U V^T (zo_offload/kernels/low_rank.py)

// A pass's factors: V lies in memory, U is made a few rows ahead.
class LowRank {
 public:
  explicit LowRank(const zo_pass& pass) : columns_(pass.columns), rank_((int)pass.rank) {
    for (Near& near : near_) near.key = nullptr;
  }

  // z of elements [g, g + n), as `gaussian`.
  template <class V, int R, class Sink>
  ZO_HD void noise(const zo_key& key, zo_u64 g, int n, Sink sink) {
    if (V::WIDTH == 1 || columns_ % V::WIDTH == 0) {  // then a row's end is a vector's
      rows<V, R>(key, g, n, sink);
      return;
    }
    alignas(64) float z[TILE + V::WIDTH];
    unaligned<V, R>(key, g, n, z);
    for (int i = 0; i < n; i += V::WIDTH) sink(i, V::load(z + i));
  }

 private:
  struct Near {  // ALIGN numbers of U from `first` on
    const zo_key* key;
    zo_u64 first;
    alignas(64) float u[ALIGN];
  };
  enum { NEAR = 8 };  // updates and lanes take turns in each tile

  // A vector at a row's end goes on beyond it: the next row, which comes later, writes over that.
  template <class V, int R>
  __attribute__((noinline)) void unaligned(const zo_key& key, zo_u64 g, int n, float* z) {
    rows<V, R>(key, g, n, [&](int i, typename V::F x) { V::store(z + i, x); });
  }

  template <class V, int R, class Sink>
  ZO_HD void rows(const zo_key& key, zo_u64 g, int n, Sink sink) {
    zo_u64 row = g / columns_, column = g % columns_;
    for (int i = 0; i < n; ++row, column = 0) {
      const int end = columns_ - column < (zo_u64)(n - i) ? i + (int)(columns_ - column) : n;
      float u[ZO_MOST_RANK];
      row_of<V, R>(key, row, u);
      const float* v = key.columns + column;
      switch (rank_) {
        case 1: run<V, 1>(u, v, i, end, sink); break;
        case 2: run<V, 2>(u, v, i, end, sink); break;
        case 4: run<V, 4>(u, v, i, end, sink); break;
        default: run<V, 0>(u, v, i, end, sink);
      }
      i = end;
    }
  }

  // Elements [i, end) of a tile, of one row. KNOWN: the rank, or 0. What the loop reads is in registers: a compiler has to
  // assume that it changes with each vector that is stored.
  template <class V, int KNOWN, class Sink>
  ZO_HD void run(const float* u, const float* v, int i, int end, Sink sink) const {
    enum { FEW = KNOWN ? KNOWN : 1 };
    const int rank = KNOWN ? KNOWN : rank_;
    const zo_u64 columns = columns_;
    typename V::F first[FEW];
    ZO_UNROLL
    for (int k = 0; k < FEW; ++k) first[k] = V::f(u[k]);
    for (; i < end; i += V::WIDTH, v += V::WIDTH) {
      typename V::F z = V::mul(first[0], V::load(v));
      ZO_UNROLL
      for (int k = 1; k < FEW; ++k) z = V::fma(first[k], V::load(v + k * columns), z);
      for (int k = FEW; k < rank; ++k) z = V::fma(V::f(u[k]), V::load(v + k * columns), z);
      sink(i, z);
    }
  }

  template <class V, int R>
  ZO_HD void row_of(const zo_key& key, zo_u64 row, float* u) {
    Near& near = near_[((zo_u64)&key / sizeof(zo_key)) % NEAR];
    for (int k = 0; k < rank_; ++k) {
      const zo_u64 at = row * rank_ + k, first = at & ~(zo_u64)(ALIGN - 1);
      if (near.key != &key || near.first != first) {
        make<V, R>(key, first, near.u);
        near.key = &key;
        near.first = first;
      }
      u[k] = near.u[at - first];
    }
  }

  template <class V, int R>
  __attribute__((noinline)) static void make(const zo_key& key, zo_u64 first, float* u) {
    gaussian<V, R>(key, first, ALIGN, [&](int i, typename V::F z) { V::store(u + i, z); });
  }

  zo_u64 columns_;
  int rank_;
  Near near_[NEAR];
};

// low: of a pass with a rank; else null.
template <class V, int R>
__attribute__((noinline)) void make_noise(const zo_key& key, zo_u64 g, int n, Noise& noise, const Ahead& ahead,
                                          LowRank* low) {
  const auto keep = [&](int i, typename V::F z) {
    ask<V>(ahead, i);
    V::store(noise.z + i, z);
  };
  if (low && ahead.asks()) {
    low->noise<V, R>(key, g, n, keep);
  } else if (low) {
    low->noise<V, R>(key, g, n, [&](int i, typename V::F z) { V::store(noise.z + i, z); });
  } else if (key.tag == ZO_TAG_GAUSSIAN || key.tag == ZO_TAG_COLUMNS) {
    gaussian<V, R>(key, g, n, keep);
  } else if (key.tag == ZO_TAG_BOX_MULLER) {
    box_muller<V, R>(key, g, n, keep);
  } else {
    philox_words<V, R, 1>(key, g >> 7, n / 128, noise.signs);
    if (ahead.asks())
      for (int i = 0; i < n; i += V::WIDTH) ask<V>(ahead, i);
  }
}

// ---- masks: a word an element, all ones where it is perturbed and updated

template <class V>
__attribute__((noinline)) void mask_magnitude(const float* w, zo_u32 limit, int n, zo_u32* mask) {
  for (int i = 0; i < n; i += V::WIDTH) V::store_bits(mask + i, zo_mask_magnitude<V>(V::load(w + i), limit));
}

template <class V, int R>
__attribute__((noinline)) void mask_random(const zo_key& key, zo_u64 g, zo_u32 limit, int n, zo_u16* random,
                                           zo_u32* mask) {
  philox_words<V, R, V::GROUPS>(key, g >> 3, n / 8, (zo_u32*)random);
  for (int i = 0; i < n; i += V::WIDTH) V::store_bits(mask + i, zo_mask_random<V>(V::load16(random + i), limit));
}

inline void mask_listed(const zo_pass& pass, zo_u64 g, int n, zo_u32* mask) {
  __builtin_memset(mask, 0, 4 * n);
  for (zo_u64 tile = g / ZO_LISTED; tile * ZO_LISTED < g + n; ++tile) {
    const zo_listed list = zo_listed_at(pass, tile);
    for (zo_u32 k = list.from; k < list.to; ++k) {
      const zo_u64 at = tile * ZO_LISTED + list.places[k] - g;  // wraps around below g
      if (at < (zo_u64)n) mask[at] = ~0u;
    }
  }
}

// A changed vector, where the mask has its elements.
template <class V, bool MASKED>
ZO_HD typename V::F kept(const zo_u32* mask, int i, typename V::F changed, typename V::F was) {
  if constexpr (MASKED)
    return zo_where<V>(V::load_bits(mask + i), changed, was);
  else
    return changed;
}

// w = fma(scale, z, w), where the mask has the element
template <class V, int R, bool MASKED>
__attribute__((noinline)) void add_noise(float* w, float by, const zo_key& key, zo_u64 g, int n, zo_u32* signs,
                                         const zo_u32* mask, const Ahead& ahead, LowRank* low) {
  const typename V::F scale = V::f(by);
  const auto add_quietly = [&](int i, typename V::F z) {
    const typename V::F was = V::load(w + i);
    V::store(w + i, kept<V, MASKED>(mask, i, zo_add_noise<V>(was, scale, z), was));
  };
  const auto add = [&](int i, typename V::F z) {
    ask<V>(ahead, i);
    add_quietly(i, z);
  };
  if (low && ahead.asks()) {
    low->noise<V, R>(key, g, n, add);
  } else if (low) {
    low->noise<V, R>(key, g, n, add_quietly);  // with so few instructions, asking for nothing is half of them
  } else if (key.tag == ZO_TAG_GAUSSIAN) {
    gaussian<V, R>(key, g, n, add);
  } else if (key.tag == ZO_TAG_BOX_MULLER) {
    box_muller<V, R>(key, g, n, add);
  } else {
    philox_words<V, R, 1>(key, g >> 7, n / 128, signs);
    for (int i = 0; i < n; i += V::WIDTH) {
      ask<V>(ahead, i);
      const typename V::F was = V::load(w + i);
      V::store(w + i, kept<V, MASKED>(mask, i, V::add_signed(was, scale, signs, i), was));
    }
  }
}

template <class V, int R, bool MASKED>
void update(float* w, const zo_update& u, const zo_key& key, zo_u64 g, int n, Noise& noise, const zo_u32* mask,
            const Ahead& ahead, LowRank* low) {
  if (u.decay != 1.0f) {
    const typename V::F decay = V::f(u.decay);
    for (int i = 0; i < n; i += V::WIDTH) {
      const typename V::F was = V::load(w + i);
      V::store(w + i, kept<V, MASKED>(mask, i, V::mul(was, decay), was));
    }
  }
  if (u.coeff != 0.0f) add_noise<V, R, MASKED>(w, -u.coeff, key, g, n, noise.signs, mask, ahead, low);
}

// What lane j is perturbed along: noise of its seed, or a sum of noises, which is floats whatever they are of.
template <class V, int R>
void make_lane_noise(const zo_work* work, zo_u32 j, zo_u64 g, int n, Noise& noise, const Ahead& ahead, LowRank* low) {
  const zo_lane& l = work->lanes[j];
  if (!(l.format & ZO_LANE_SUM)) {
    make_noise<V, R>(work->lane_keys[j], g, n, noise, ahead, low);
    return;
  }
  __builtin_memset(noise.z, 0, 4 * n);
  const zo_u32 first = (zo_u32)l.seed, count = (zo_u32)(l.seed >> 32);
  for (zo_u32 k = first; k < first + count; ++k)
    if (work->terms[k].coeff != 0.0f)
      add_noise<V, R, false>(noise.z, work->terms[k].coeff, work->term_keys[k], g, n, noise.signs, 0, ahead, low);
}

// Its distribution as `lane` goes by it: floats, or signs.
inline int tag_of_lane(const zo_work* work, const zo_lane& l) {
  return l.format & ZO_LANE_SUM ? (int)ZO_TAG_GAUSSIAN : work->tag;
}

template <class V, bool PAST_CACHE, bool MASKED>
__attribute__((noinline)) void lane(const float* w, const Noise& noise, int tag, float scale, const zo_u32* mask,
                                    int format, zo_u8* out, int n) {
  const typename V::F s = V::f(scale);
  if (scale == 0.0f)
    emit<V, PAST_CACHE>(format, out, n, [&](int i) { return V::load(w + i); });
  else if (tag != ZO_TAG_RADEMACHER)
    emit<V, PAST_CACHE>(format, out, n, [&](int i) {
      const typename V::F was = V::load(w + i);
      return kept<V, MASKED>(mask, i, zo_add_noise<V>(was, s, V::load(noise.z + i)), was);
    });
  else
    emit<V, PAST_CACHE>(format, out, n, [&](int i) {
      const typename V::F was = V::load(w + i);
      return kept<V, MASKED>(mask, i, V::add_signed(was, s, noise.signs, i), was);
    });
}

// ---- one run of consecutive elements

// Which of a tile's elements a pass emits, and which it has to read for that: whole groups, to the parameter's end.
struct Cut {
  zo_u64 first;    // element index of the tile
  int head, count; // emitted: [head, head + count)
  int begin, end;  // read: [begin, end)
  int span;        // computed: [0, span)
  bool whole() const { return begin == 0 && end == span; }
};

inline Cut cut_tile(const zo_pass& pass, zo_u64 g, zo_u64 n) {
  Cut cut;
  cut.head = (int)(g & (ALIGN - 1));
  cut.count = n < (zo_u64)(TILE - cut.head) ? (int)n : TILE - cut.head;
  cut.first = g - cut.head;
  cut.begin = cut.head;
  cut.end = cut.head + cut.count;
  cut.span = (cut.end + ALIGN - 1) & ~(ALIGN - 1);
  const int unit = pass.group ? (int)pass.group : pass.across ? 2 : 1;  // across rows: whole bytes
  if (unit > 1) {
    const zo_u64 last = pass.offset + pass.total - cut.first;
    cut.begin &= ~(unit - 1);
    cut.end = (cut.end + unit - 1) & ~(unit - 1);
    if ((zo_u64)cut.end > last) cut.end = (int)last;
  }
  return cut;
}

// the planes at element g, a multiple of the group
inline Planes planes_at(const zo_pass& pass, zo_u64 g) {
  const zo_u64 at = g - pass.offset, group = pass.group ? at / pass.group : 0;
  const int format = (int)pass.format;
  Planes p = {(zo_u8*)pass.stored + at * zo_format_bits(format) / 8,
              (zo_u8*)pass.scales + group * zo_own_scale_bytes(format),
              (zo_u8*)pass.minima + group * zo_own_minimum_bytes(format),
              (zo_u8*)pass.residual + at * zo_residual_bytes(format)};
  return p;
}

struct Bounce {  // a copy of a tile that is cut, or a place for what is not kept
  alignas(64) zo_u8 values[TILE * 4], residual[TILE * 2];
  alignas(64) zo_u8 scales[MAX_GROUPS * 4], minima[MAX_GROUPS * 4];
  Planes planes() { return {values, scales, minima, residual}; }
};

// Copies the cut's planes into the bounce buffer, or what changes in a pass back from it.
template <bool BACK>
void carry(const zo_pass& pass, const Cut& cut, Bounce& bounce, bool residual) {
  const int format = (int)pass.format, bits = zo_format_bits(format), group = pass.group ? (int)pass.group : ALIGN;
  const Planes there = planes_at(pass, cut.first + cut.begin), here = bounce.planes();
  const int k = cut.begin / group, groups = (cut.end + group - 1) / group - k;
  auto copy = [](zo_u8* out, zo_u8* in, int size) {
    if (size) __builtin_memcpy(BACK ? in : out, BACK ? out : in, size);
  };
  if (!BACK) {
    __builtin_memset(here.values, 0, cut.span * bits / 8);
    __builtin_memset(here.scales, 0, sizeof bounce.scales);
    __builtin_memset(here.minima, 0, sizeof bounce.minima);
    if (residual) __builtin_memset(here.residual, 0, cut.span * zo_residual_bytes(format));
  }
  copy(here.values + cut.begin * bits / 8, there.values, ((cut.end - cut.begin) * bits + 7) / 8);
  copy(here.scales + k * zo_own_scale_bytes(format), there.scales, groups * zo_own_scale_bytes(format));
  copy(here.minima + k * zo_own_minimum_bytes(format), there.minima, groups * zo_own_minimum_bytes(format));
  if (residual)
    copy(here.residual + cut.begin * zo_residual_bytes(format), there.residual,
         (cut.end - cut.begin) * zo_residual_bytes(format));
}

// Elements beside the cut have noise like any other: they must not move the scale of a group they are not in.
inline void clear_outside(const Cut& cut, float* w) {
  __builtin_memset(w, 0, 4 * cut.begin);
  __builtin_memset(w + cut.end, 0, 4 * (cut.span - cut.end));
}

// mask: null if it has all elements.
template <class V, bool PAST_CACHE>
void any_lane(const float* w, const Noise& noise, int tag, float scale, const zo_u32* mask, int format, zo_u8* out,
              int n) {
  if (mask)
    lane<V, PAST_CACHE, true>(w, noise, tag, scale, mask, format, out, n);
  else
    lane<V, PAST_CACHE, false>(w, noise, tag, scale, mask, format, out, n);
}

// One output of a tile, w + scale * noise where the mask has the element, through a bounce buffer where the tile is cut.
template <class V>
void emit_lane(const zo_work* work, const zo_lane& l, const Cut& cut, zo_u64 out_at, float scale, const float* w,
               const Noise& noise, const zo_u32* mask, zo_u8* scratch) {
  const int format = format_of_lane(l), tag = tag_of_lane(work, l), size = zo_format_bytes(format);
  zo_u8* out = (zo_u8*)l.out + out_at * size;
  if (cut.head || cut.count != cut.span) {
    any_lane<V, false>(w, noise, tag, scale, mask, format, scratch, cut.span);
    __builtin_memcpy(out, scratch + cut.head * size, (zo_u64)cut.count * size);
  } else if (work->past_cache && ((zo_u64)out & 63) == 0) {
    any_lane<V, true>(w, noise, tag, scale, mask, format, out, cut.span);
  } else {
    any_lane<V, false>(w, noise, tag, scale, mask, format, out, cut.span);
  }
}

template <class V, int R>
void segment(const zo_work* work, zo_u64 g, zo_u64 n, zo_u64 out_at) {
  alignas(64) float w[TILE];
  alignas(64) zo_u32 mask[TILE];
  alignas(64) zo_u16 random[TILE];
  Bounce bounce, scratch;
  Noise noise;
  Grid grid;
  const zo_pass& pass = *work->pass;
  const int format = (int)pass.format;
  const bool write_back = pass.flags & ZO_WRITE_BACK, exact = format == ZO_FP32 || format == ZO_BF16_16,
             stochastic = pass.flags & ZO_STOCHASTIC && !exact;
  const bool master = zo_residual_bytes(format) && (work->last_fold >= 0 || pass.flags & ZO_MASTER);
  grid.group = (int)pass.group;
  grid.middle = zo_int4_middle(pass.flags & ZO_CENTRED);
  const Ahead nothing(w);
  LowRank factors(pass), *low = pass.rank ? &factors : nullptr;
  while (n) {
    const Cut cut = cut_tile(pass, g, n);
    const int span = cut.span;
    Planes planes = bounce.planes();
    if (cut.whole())
      planes = planes_at(pass, cut.first);
    else
      carry<false>(pass, cut, bounce, master);
    if (grid.group) load_grid(format, planes, grid, span);
    const zo_u64 at = cut.first - pass.offset;  // wraps around before the planes' first element, which is not read
    if (format == ZO_MXFP4_ACROSS)
      load_across((const zo_u8*)pass.scales, pass.across, at, cut.begin, cut.end, grid);
    if (format == ZO_NVFP4_TWO) load_two((const float*)pass.minima, at, cut.begin, cut.end, grid);
    if (master)
      join<V>(format, planes, grid, w, span);
    else
      decode<V>(format, planes, grid, w, span);
    if (pass.mask == ZO_MASK_RANDOM) mask_random<V, R>(*work->mask_key, cut.first, pass.mask_limit, span, random, mask);
    if (pass.mask == ZO_MASK_LISTED) mask_listed(pass, cut.first, span, mask);
    Ahead ahead(w);
    if (n > (zo_u64)cut.count)
      ahead.read_tile(work, planes_at(pass, cut.first + span).values);
    if (!writes_later(work)) ahead.write_lanes(work, 0, out_at);
    for (zo_u32 k = 0; k < pass.num_updates; ++k) {
      if (pass.mask == ZO_MASK_MAGNITUDE && !(k && work->updates[k].flags & ZO_UPDATE_SAME_STEP))
        mask_magnitude<V>(w, pass.mask_limit, span, mask);
      if (pass.mask)
        update<V, R, true>(w, work->updates[k], work->update_keys[k], cut.first, span, noise, mask,
                           k ? nothing : ahead, low);
      else
        update<V, R, false>(w, work->updates[k], work->update_keys[k], cut.first, span, noise, mask,
                            k ? nothing : ahead, low);
      if (!(work->updates[k].flags & ZO_UPDATE_FOLD)) continue;
      if (stochastic)
        philox_words<V, R, V::GROUPS>(work->rounding_keys[k], cut.first >> 3, span / 8, (zo_u32*)random);
      const bool last = (int)k == work->last_fold, keep = write_back && last;
      if (grid.group && !cut.whole()) clear_outside(cut, w);
      encode<V>(format, keep ? planes : scratch.planes(), grid, w, span, stochastic ? random : 0, last);
      if (!keep) continue;
      if (grid.group) store_grid(format, grid, planes, span);
      if (!cut.whole()) carry<true>(pass, cut, bounce, master);
    }
    if (pass.mask == ZO_MASK_MAGNITUDE && pass.num_lanes) mask_magnitude<V>(w, pass.mask_limit, span, mask);
    for (zo_u32 j = 0; j < pass.num_lanes; ++j) {
      const zo_lane& l = work->lanes[j];
      if (work->lane_keys[j].fresh) {
        Ahead later(w);
        if (j > 1 || writes_later(work)) later.write_lanes(work, j, out_at);
        make_lane_noise<V, R>(work, j, cut.first, span, noise, j || pass.num_updates ? later : ahead, low);
      }
      emit_lane<V>(work, l, cut, out_at, l.scale, w, noise, pass.mask ? mask : 0, scratch.values);
    }
    g += cut.count;
    out_at += cut.count;
    n -= cut.count;
  }
}

// ---- scales as what trains: the same pass over the scales of GROUPS groups, then their codes times these for each lane

template <class V, int R>
void scales_segment(const zo_work* work, zo_u64 g, zo_u64 n, zo_u64 out_at) {
  const int GROUPS = ALIGN;  // at a time: whole blocks of noise
  alignas(64) float scale[GROUPS], moved[GROUPS], w[TILE];
  Bounce bounce;
  Noise noise;
  Grid grid;
  const zo_pass& pass = *work->pass;
  const zo_u64 base = pass.offset, group = pass.group;
  const int format = (int)pass.format;
  grid.group = (int)group;
  grid.middle = zo_int4_middle(pass.flags & ZO_CENTRED);
  while (n) {
    const zo_u64 k0 = g / group / GROUPS * GROUPS, from = g / group;  // group indices in the parameter
    zo_u64 stop = (k0 + GROUPS) * group;
    if (stop > g + n) stop = g + n;
    const int begin = (int)(from - k0), end = (int)((stop + group - 1) / group - k0);
    float* stored = (float*)pass.scales + (from - base / group);
    __builtin_memset(scale, 0, sizeof scale);
    __builtin_memcpy(scale + begin, stored, 4 * (end - begin));
    for (zo_u32 k = 0; k < pass.num_updates; ++k) {
      update<V, R, false>(scale, work->updates[k], work->update_keys[k], k0, GROUPS, noise, 0, Ahead(w), nullptr);
      for (int i = begin; i < end; ++i) scale[i] = zo_trained_scale(scale[i]);
      if (pass.flags & ZO_WRITE_BACK && (int)k == work->last_fold)
        __builtin_memcpy(stored, scale + begin, 4 * (end - begin));
    }
    for (zo_u32 j = 0; j < pass.num_lanes; ++j) {
      const zo_lane& l = work->lanes[j];
      if (work->lane_keys[j].fresh) make_lane_noise<V, R>(work, j, k0, GROUPS, noise, Ahead(w), nullptr);
      lane<V, false, false>(scale, noise, tag_of_lane(work, l), l.scale, 0, ZO_FP32, (zo_u8*)moved, GROUPS);
      for (zo_u64 at = g; at < stop;) {
        const Cut cut = cut_tile(pass, at, stop - at);
        Planes planes = bounce.planes();
        if (cut.whole())
          planes = planes_at(pass, cut.first);
        else
          carry<false>(pass, cut, bounce, false);
        load_grid(format, planes, grid, cut.span);
        for (int k = cut.begin / grid.group; k < (cut.end + grid.group - 1) / grid.group; ++k)
          grid.scale[k] = moved[cut.first / group + k - k0];
        decode<V>(format, planes, grid, w, cut.span);
        emit_lane<V>(work, l, cut, out_at + (at - g), 0.0f, w, noise, 0, bounce.values);
        at += cut.count;
      }
    }
    out_at += stop - g;
    n -= stop - g;
    g = stop;
  }
}

// ---- values into a format, as they are first stored

template <class V>
void encode_segment(const zo_work* work, zo_u64 g, zo_u64 n, zo_u64* not_finite) {
  alignas(64) float w[TILE];
  Bounce bounce, source;
  Grid grid;
  const zo_pass& pass = *work->pass;
  const int format = (int)pass.format, from = (int)work->values_format, size = zo_format_bytes(from);
  grid.group = (int)pass.group;
  grid.middle = zo_int4_middle(pass.flags & ZO_CENTRED);
  while (n) {
    const Cut cut = cut_tile(pass, g, n);
    const zo_u8* values = (const zo_u8*)work->values + (g - pass.offset) * size;
    Planes planes = cut.whole() ? planes_at(pass, cut.first) : bounce.planes(), in = source.planes();
    if (cut.whole()) {
      in.values = (zo_u8*)values;
    } else {
      __builtin_memset(in.values, 0, cut.span * size);
      __builtin_memcpy(in.values + cut.head * size, values, (zo_u64)cut.count * size);
    }
    decode<V>(from, in, grid, w, cut.span);
    not_finite[0] += count_not_finite<V>(w, cut.span);
    for (int k = 0; k < MAX_GROUPS; ++k) grid.scale[k] = 0.0f;
    if (zo_trains(format))
      encode<V>(format, planes, grid, w, cut.span, 0, true);
    else
      encode_four_bits<V>(format, planes, grid, w, cut.span, cut.end);
    if (zo_trains(format)) not_finite[1] += count_not_finite<V>(w, cut.span);
    if (grid.group) store_grid(format, grid, planes, cut.span);
    if (!cut.whole()) carry<true>(pass, cut, bounce, zo_residual_bytes(format));
    g += cut.count;
    n -= cut.count;
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
    make_noise<V, R>(*key, g - head, span, noise, Ahead(w), nullptr);
    if (key->tag == ZO_TAG_RADEMACHER)  // 0 + 1 * sign
      for (int i = 0; i < span; i += V::WIDTH)
        V::store(noise.z + i, V::add_signed(V::load(w + i), V::f(1.0f), noise.signs, i));
    __builtin_memcpy(out, noise.z + head, (zo_u64)count * 4);
    out += count;
    g += count;
    n -= count;
  }
}

// z of each of the 65,536 half-words
template <class V>
void gaussian_table(float* out) {
  zo_u32 s[V::WIDTH];
  for (int h = 0; h < 1 << 16; h += V::WIDTH) {
    for (int i = 0; i < V::WIDTH; ++i) s[i] = (zo_u32)(h + i) << 16;
    V::store(out + h, V::gaussian(V::load_bits(s)));
  }
}

template <class V>
zo_kernels kernels() {
  zo_kernels k = {{segment<V, 7>, segment<V, 10>},
                  {scales_segment<V, 7>, scales_segment<V, 10>},
                  {noise_segment<V, 7>, noise_segment<V, 10>},
                  encode_segment<V>,
                  gaussian_table<V>};
  return k;
}

}  // namespace
