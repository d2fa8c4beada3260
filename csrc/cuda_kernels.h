// The fused pass (fused.h), its gathered-rows form and plain noise as CUDA kernels: one source for nvcc and NVRTC, no
// #include but our own headers.
//
// A warp owns a tile of CHUNKS * 256 consecutive elements, aligned in the element index so that Philox blocks never
// straddle threads; thread L holds elements 256 * c + 8 * L + 0..7 of it, in registers from the first decode to the
// last lane. So a weight is read once and written once, 16 bytes an access (8 for one-byte formats), and nothing
// depends on the launch shape. Head, tail and addresses that are not 16-byte aligned take the same arithmetic with
// element-wide accesses.
//
//   gaussian    two Philox blocks for a thread's 8 elements                                     2 chunks
//   rademacher  thread L makes word L of the tile's 32 sign words, a shuffle brings it to its users  4 chunks
//
// Coefficients, decays and seeds of updates are read from device memory: the host need not know them when it launches.
// A zero coefficient and a decay of one are skipped as fused.h says, so a step that diverged changes nothing.
//
// Checked without a GPU by translating the compiler's PTX to C and comparing bits with the CPU library
// (tests/test_cuda_ptx.py); registers and spills by tests/test_cuda_build.py.
#ifndef ZO_CUDA_KERNELS_H
#define ZO_CUDA_KERNELS_H
#include "fused.h"

#define ZO_CUDA_LANES 16    // a launch; more lanes take more launches
#define ZO_CUDA_THREADS 256

struct zo_cuda_args {  // the kernels' only parameter, by value
  zo_pass pass;        // updates: device memory; lanes: unused
  const float* scales;  // of the lanes, in device memory, or null: `lanes[j].scale`
  zo_u64 total_rows;    // of the parameter, with rows; others are answered with NaN
  zo_i32 last_fold;     // index of the last update that folds, or -1: the host knows which fold
  zo_u32 num_lanes;
  zo_lane lanes[ZO_CUDA_LANES];
};

struct zo_cuda_noise_args {
  float* out;
  zo_u64 numel, offset, seed;
  zo_u32 param_id, rounds;
};

static_assert(sizeof(zo_cuda_args) == sizeof(zo_pass) + 24 + 24 * ZO_CUDA_LANES, "packed by Python");
static_assert(sizeof(zo_cuda_noise_args) == 40, "packed by Python");

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

// ---- noise

// Two Philox streams side by side, so that one's latency hides under the other's.
ZO_DEV void philox2(zo_words& a, zo_words& b, zo_u64 seed, zo_u32 rounds) {
  zo_philox_rounds<0, 7>(a.w, seed);
  zo_philox_rounds<0, 7>(b.w, seed);
  if (rounds == 10) {
    zo_philox_rounds<7, 10>(a.w, seed);
    zo_philox_rounds<7, 10>(b.w, seed);
  }
}

ZO_DEV zo_words philox(zo_u64 block, zo_u32 word2, zo_u32 tag, zo_u64 seed, zo_u32 rounds) {
  zo_words a = {{(zo_u32)block, (zo_u32)(block >> 32), word2, tag}};
  zo_philox_rounds<0, 7>(a.w, seed);
  if (rounds == 10) zo_philox_rounds<7, 10>(a.w, seed);
  return a;
}

// The z of a thread's elements under one seed. g: the thread's first element in chunk 0, a multiple of 8.
template <int N>
struct GaussianOf {
  enum { CHUNKS = N };
  typedef GaussianOf<1> Part;
  float z[CHUNKS][8];
  ZO_DEV void make(GaussianOf& n, zo_u64 g, zo_u64 seed, zo_u32 param_id, zo_u32 rounds) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const zo_u64 block = (g + 256 * c) >> 2, next = block + 1;
      zo_words a = {{(zo_u32)block, (zo_u32)(block >> 32), param_id, ZO_TAG_GAUSSIAN}};
      zo_words b = {{(zo_u32)next, (zo_u32)(next >> 32), param_id, ZO_TAG_GAUSSIAN}};
      philox2(a, b, seed, rounds);
      zo_gaussian_pair<S>(a.w[0], a.w[1], n.z[c][0], n.z[c][1]);
      zo_gaussian_pair<S>(a.w[2], a.w[3], n.z[c][2], n.z[c][3]);
      zo_gaussian_pair<S>(b.w[0], b.w[1], n.z[c][4], n.z[c][5]);
      zo_gaussian_pair<S>(b.w[2], b.w[3], n.z[c][6], n.z[c][7]);
    }
  }
  ZO_DEV void add(const GaussianOf& n, int c, float scale, const float (&w)[8], float (&out)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = zo_add_noise<S>(w[j], scale, n.z[c][j]);
  }
  ZO_DEV float value(const GaussianOf& n, int c, int j) { return n.z[c][j]; }
};

typedef GaussianOf<2> Gaussian;

template <int N>
struct RademacherOf {
  enum { CHUNKS = N };
  typedef RademacherOf<1> Part;
  zo_u32 signs[CHUNKS];  // 8 bits each
  ZO_DEV zo_u32 pick(const zo_words& b, zo_u32 i) {
    const zo_u32 low = i & 1 ? b.w[1] : b.w[0], high = i & 1 ? b.w[3] : b.w[2];
    return i & 2 ? high : low;
  }
  ZO_DEV void make(RademacherOf& n, zo_u64 g, zo_u64 seed, zo_u32 param_id, zo_u32 rounds) {
    const zo_u32 lane = threadIdx.x & 31;
    if constexpr (CHUNKS == 4) {
      const zo_u64 tile = g - 8 * lane;  // a multiple of 1024: 8 blocks, 32 words
      const zo_u32 word = pick(philox((tile >> 7) + (lane >> 2), param_id, ZO_TAG_RADEMACHER, seed, rounds), lane);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
        n.signs[c] = __shfl_sync(0xffffffffu, word, 8 * c + (lane >> 2)) >> (8 * (lane & 3)) & 0xffu;
    } else {
      const zo_words b = philox(g >> 7, param_id, ZO_TAG_RADEMACHER, seed, rounds);
      n.signs[0] = pick(b, (zo_u32)(g >> 5)) >> (zo_u32)(g & 24) & 0xffu;
    }
  }
  ZO_DEV void add(const RademacherOf& n, int c, float scale, const float (&w)[8], float (&out)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = zo_add_sign<S>(w[j], scale, n.signs[c] << (31 - j) & 0x80000000u);
  }
  ZO_DEV float value(const RademacherOf& n, int c, int j) {
    return S::value(0x3f800000u | (n.signs[c] << (31 - j) & 0x80000000u));
  }
};

typedef RademacherOf<4> Rademacher;

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

// out: a lane's output; its dtype is the same for a whole launch's thread, so the branch never diverges
template <bool WHOLE>
ZO_DEV void write_lane(const zo_lane& lane, zo_u64 at, int lo, int hi, const float (&w)[8]) {
  zo_u8* out = (zo_u8*)lane.out + at * (lane.format == ZO_FP32 ? 4 : 2);
  if (lane.format == ZO_FP32)
    write_fp32<WHOLE>(out, lo, hi, w);
  else if (lane.format == ZO_BF16)
    write_bf16<WHOLE>(out, lo, hi, w);
  else
    write_fp16<WHOLE>(out, lo, hi, w);
}

// ---- storage formats: 8 elements between bytes and floats. random: 8 half-words, or null to round to nearest.

struct Fp32 {
  enum { SIZE = 4 };
  template <bool WHOLE>
  ZO_DEV void load(const zo_u8* p, int lo, int hi, float (&w)[8]) {
    zo_u32 word[8];
    read_bytes<WHOLE, 4>(p, lo, hi, word);
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = S::value(word[j]);
  }
  template <bool WHOLE>
  ZO_DEV void fold(zo_u8* p, int lo, int hi, float (&w)[8], bool, const zo_words&, bool keep) {
    if (keep) write_fp32<WHOLE>(p, lo, hi, w);
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = S::value(zo_fp32_round<S>(w[j]));
  }
};

ZO_DEV zo_u32 half_word(const zo_words& r, int j) { return r.w[j / 2] >> (16 * (j & 1)) & 0xffffu; }

struct Bf16 {
  enum { SIZE = 2 };
  ZO_DEV void unpack(const zo_u32 (&word)[4], float (&w)[8]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      w[2 * j] = S::value(word[j] << 16);
      w[2 * j + 1] = S::value(word[j] & 0xffff0000u);
    }
  }
  template <bool WHOLE>
  ZO_DEV void load(const zo_u8* p, int lo, int hi, float (&w)[8]) {
    zo_u32 word[4];
    read_bytes<WHOLE, 2>(p, lo, hi, word);
    unpack(word, w);
  }
  template <bool WHOLE>
  ZO_DEV void fold(zo_u8* p, int lo, int hi, float (&w)[8], bool stochastic, const zo_words& r, bool keep) {
    zo_u32 word[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (stochastic)
        word[j] = zo_bf16_round_stochastic<S>(w[2 * j], half_word(r, 2 * j)) >> 16 |
                  (zo_bf16_round_stochastic<S>(w[2 * j + 1], half_word(r, 2 * j + 1)) & 0xffff0000u);
      else
        word[j] = pack_bf16(w[2 * j], w[2 * j + 1]);
    }
    if (keep) write_bytes<WHOLE, 2>(p, lo, hi, word);
    unpack(word, w);
  }
};

struct Fp16 {
  enum { SIZE = 2 };
  ZO_DEV void unpack(const zo_u32 (&word)[4], float (&w)[8]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      w[2 * j] = zo_fp16_decode<S>(word[j] & 0xffffu);
      w[2 * j + 1] = zo_fp16_decode<S>(word[j] >> 16);
    }
  }
  template <bool WHOLE>
  ZO_DEV void load(const zo_u8* p, int lo, int hi, float (&w)[8]) {
    zo_u32 word[4];
    read_bytes<WHOLE, 2>(p, lo, hi, word);
    unpack(word, w);
  }
  template <bool WHOLE>
  ZO_DEV void fold(zo_u8* p, int lo, int hi, float (&w)[8], bool stochastic, const zo_words& r, bool keep) {
    zo_u32 word[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (stochastic)
        word[j] = zo_fp16_round_stochastic<S>(w[2 * j], half_word(r, 2 * j)) |
                  zo_fp16_round_stochastic<S>(w[2 * j + 1], half_word(r, 2 * j + 1)) << 16;
      else
        word[j] = pack_fp16(w[2 * j], w[2 * j + 1]);
    }
    if (keep) write_bytes<WHOLE, 2>(p, lo, hi, word);
    unpack(word, w);
  }
};

// ---- the pass over one tile

// A run of consecutive elements [first, last) of the parameter. Element g lies `g - first` elements after `stored`,
// and its outputs `g - first + out_at` after theirs. valid: false for a row that does not exist.
struct Run {
  zo_u64 first, last, out_at;
  zo_u8* stored;
  bool valid;
};

struct Span {  // which of the 8 elements from g on are in the run
  int lo, hi;
};
template <bool WHOLE>
ZO_DEV Span span_of(const Run& run, zo_u64 g) {
  if constexpr (WHOLE) return Span{0, 8};
  Span s;
  s.lo = run.first > g ? (run.first - g < 8 ? (int)(run.first - g) : 8) : 0;
  s.hi = run.last > g ? (run.last - g < 8 ? (int)(run.last - g) : 8) : 0;
  return s;
}

// WHOLE: the tile lies inside the run and everything is aligned; the hot loop has nothing else in it.
template <class Format, class Noise, bool WHOLE>
ZO_DEV void tile_of(const zo_cuda_args& args, const Run& run, zo_u64 start) {
  enum { CHUNKS = Noise::CHUNKS };
  const zo_pass& pass = args.pass;
  const zo_u64 g = start + 8 * (threadIdx.x & 31);
  float w[CHUNKS][8];
  Noise noise;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const Span s = span_of<WHOLE>(run, g + 256 * c);
    const zo_i64 at = (zo_i64)(g + 256 * c - run.first) * Format::SIZE;
    if constexpr (!WHOLE)
#pragma unroll
      for (int j = 0; j < 8; ++j) w[c][j] = S::value(0x7fc00000u);
    if (WHOLE || (run.valid && s.lo < s.hi)) Format::template load<WHOLE>(run.stored + at, s.lo, s.hi, w[c]);
  }
#pragma unroll 1
  for (zo_u32 k = 0; k < pass.num_updates; ++k) {
    const zo_update& u = pass.updates[k];
    const float coeff = u.coeff, decay = u.decay;
    const zo_u64 seed = u.seed;
    if (decay != 1.0f)
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int j = 0; j < 8; ++j) w[c][j] = S::mul(w[c][j], decay);
    if (coeff != 0.0f) {
      Noise::make(noise, g, seed, pass.param_id, pass.rounds);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) Noise::add(noise, c, -coeff, w[c], w[c]);
    }
    if (!(u.flags & ZO_UPDATE_FOLD)) continue;
    const bool keep = (pass.flags & ZO_WRITE_BACK) && (zo_i32)k == args.last_fold && run.valid;
    const bool stochastic = (pass.flags & ZO_STOCHASTIC) && Format::SIZE != 4;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const zo_u64 e = g + 256 * c;
      const Span s = span_of<WHOLE>(run, e);
      zo_words random = {{0, 0, 0, 0}};
      if (stochastic) random = philox(e >> 3, pass.param_id, ZO_TAG_ROUNDING, seed, pass.rounds);
      Format::template fold<WHOLE>(run.stored + (zo_i64)(e - run.first) * Format::SIZE, s.lo, s.hi, w[c], stochastic,
                                   random, keep && s.lo < s.hi);
    }
  }
  zo_u64 made = 0;
  bool have = false;
#pragma unroll 1
  for (zo_u32 j = 0; j < args.num_lanes; ++j) {
    const zo_lane& lane = args.lanes[j];
    const float scale = args.scales ? args.scales[j] : lane.scale;
    if (scale != 0.0f && !(have && made == lane.seed)) {
      Noise::make(noise, g, lane.seed, pass.param_id, pass.rounds);
      made = lane.seed;
      have = true;
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const zo_u64 e = g + 256 * c;
      const Span s = span_of<WHOLE>(run, e);
      if (s.lo >= s.hi) continue;
      float out[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = w[c][i];
      if (scale != 0.0f) Noise::add(noise, c, scale, w[c], out);
      write_lane<WHOLE>(lane, e - run.first + run.out_at, s.lo, s.hi, out);
    }
  }
}

// Element 8 * i of the parameter is 16-byte aligned in everything that this run touches.
template <class Format>
ZO_DEV bool aligned(const zo_cuda_args& args, const Run& run) {
  zo_u64 low = (zo_u64)run.stored - run.first * Format::SIZE;
  for (zo_u32 j = 0; j < args.num_lanes; ++j)
    low |= (zo_u64)args.lanes[j].out + (run.out_at - run.first) * (args.lanes[j].format == ZO_FP32 ? 4 : 2);
  return (low & 15) == 0 && run.valid;
}

template <class Format, class Noise>
ZO_DEV void tile(const zo_cuda_args& args, const Run& run, zo_u64 start, bool aligned) {
  if (aligned && start >= run.first && start + 256 * Noise::CHUNKS <= run.last)
    tile_of<Format, Noise, true>(args, run, start);
  else
#pragma unroll 1
    for (int c = 0; c < Noise::CHUNKS; ++c) tile_of<Format, typename Noise::Part, false>(args, run, start + 256 * c);
}

ZO_DEV zo_u64 tiles_of(zo_u64 first, zo_u64 last, zo_u64 size) { return (last + size - 1) / size - first / size; }

// All warps of the grid walk over the tiles; every condition here is the same for a whole warp.
template <class Format, class Noise>
ZO_DEV void pass_kernel(const zo_cuda_args& args) {
  const zo_u64 TILE = 256 * Noise::CHUNKS;
  const zo_pass& pass = args.pass;
  const zo_u64 warps = (zo_u64)gridDim.x * (ZO_CUDA_THREADS / 32);
  const zo_u64 warp = (zo_u64)blockIdx.x * (ZO_CUDA_THREADS / 32) + threadIdx.x / 32;
  if (!pass.rows) {
    const Run run = {pass.offset, pass.offset + pass.numel, 0, (zo_u8*)pass.stored, true};
    const zo_u64 tiles = tiles_of(run.first, run.last, TILE), base = run.first / TILE;
    const bool even = aligned<Format>(args, run);
    for (zo_u64 t = warp; t < tiles; t += warps) tile<Format, Noise>(args, run, (base + t) * TILE, even);
    return;
  }
  const zo_u64 a_row = pass.numel / TILE + 2;  // tiles a row touches, at most
  for (zo_u64 t = warp; t < pass.num_rows * a_row; t += warps) {
    const zo_u64 u = t / a_row;
    const zo_i64 row = pass.rows[u];
    const bool valid = row >= 0 && (zo_u64)row < args.total_rows;
    const zo_u64 first = valid ? (zo_u64)row * pass.numel : 0;
    const Run run = {first, first + pass.numel, u * pass.numel, (zo_u8*)pass.stored + first * Format::SIZE, valid};
    const zo_u64 start = (first / TILE + t % a_row) * TILE;
    if (start < run.last) tile<Format, Noise>(args, run, start, aligned<Format>(args, run));
  }
}

template <class Noise>
ZO_DEV void noise_kernel(const zo_cuda_noise_args& args) {
  const zo_u64 TILE = 256 * Noise::CHUNKS;
  const Run run = {args.offset, args.offset + args.numel, 0, (zo_u8*)args.out, true};
  const zo_u64 tiles = tiles_of(run.first, run.last, TILE), base = run.first / TILE;
  const zo_u64 warps = (zo_u64)gridDim.x * (ZO_CUDA_THREADS / 32);
  const zo_u64 warp = (zo_u64)blockIdx.x * (ZO_CUDA_THREADS / 32) + threadIdx.x / 32;
  for (zo_u64 t = warp; t < tiles; t += warps) {
    const zo_u64 g = (base + t) * TILE + 8 * (threadIdx.x & 31);
    Noise noise;
    Noise::make(noise, g, args.seed, args.param_id, args.rounds);
#pragma unroll
    for (int c = 0; c < Noise::CHUNKS; ++c) {
      const Span s = span_of<false>(run, g + 256 * c);
      if (s.lo >= s.hi) continue;
      float z[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) z[j] = Noise::value(noise, c, j);
      write_fp32<false>((zo_u8*)args.out + (zo_i64)(g + 256 * c - run.first) * 4, s.lo, s.hi, z);
    }
  }
}

}  // namespace zo_cuda

#define ZO_PASS_KERNELS(NAME, FORMAT)                                                                             \
  extern "C" __global__ void __launch_bounds__(ZO_CUDA_THREADS, 2) zo_pass_##NAME##_gaussian(const zo_cuda_args args) { \
    zo_cuda::pass_kernel<FORMAT, zo_cuda::Gaussian>(args);                                                        \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(ZO_CUDA_THREADS, 2)                                                   \
      zo_pass_##NAME##_rademacher(const zo_cuda_args args) {                                                      \
    zo_cuda::pass_kernel<FORMAT, zo_cuda::Rademacher>(args);                                                      \
  }

ZO_PASS_KERNELS(fp32, zo_cuda::Fp32)
ZO_PASS_KERNELS(bf16, zo_cuda::Bf16)
ZO_PASS_KERNELS(fp16, zo_cuda::Fp16)

// read by Python before the first launch: an image made from other sources would be handed other structs
extern "C" __device__ zo_u32 zo_cuda_abi = ZO_ABI_VERSION << 16 | ZO_LAYOUT_VERSION << 12 | (zo_u32)sizeof(zo_cuda_args);

extern "C" __global__ void __launch_bounds__(ZO_CUDA_THREADS, 2) zo_noise_gaussian(const zo_cuda_noise_args args) {
  zo_cuda::noise_kernel<zo_cuda::Gaussian>(args);
}
extern "C" __global__ void __launch_bounds__(ZO_CUDA_THREADS, 2) zo_noise_rademacher(const zo_cuda_noise_args args) {
  zo_cuda::noise_kernel<zo_cuda::Rademacher>(args);
}

#endif
