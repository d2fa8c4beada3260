// The CPU library's entry points: check, make key schedules, cut into chunks, run on the pool.
#include "cpu_threads.h"
#include "cpu_work.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define ZO_X86 1
#elif defined(__aarch64__) && defined(__AARCH64EL__)
#define ZO_ARM 1
#endif

namespace {

// Elements a chunk, powers of two: small enough to share out evenly, large enough to make its overhead vanish.
const zo_u64 MIN_CHUNK = 1 << 13, MAX_CHUNK = 1 << 16;
// Below this many element-streams a call stays on its thread: waking another costs more than it saves.
const zo_u64 SMALL = 1 << 16;
// Lanes of more bytes than this would be read back from memory anyway. Storing past the cache saves reading each line
// before it is overwritten: a fifth to a quarter faster at 32 Mi elements on Zen 5, no faster or slower below.
const zo_u64 PAST_CACHE = 32 << 20;

// Flush-to-zero or another rounding mode (torch.set_flush_denormal) would change results: standard mode while we run.
class StandardFloat {
#if ZO_X86
 public:
  StandardFloat() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~StandardFloat() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif ZO_ARM
 public:
  StandardFloat() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    write(0);
  }
  ~StandardFloat() { write(saved_); }

 private:
  static void write(zo_u64 mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
  zo_u64 saved_;
#endif
};

// Stores past the cache are not ordered with others: they must land before this thread says it is done.
void order_stores() {
#if ZO_X86
  _mm_sfence();
#endif
}

bool has_isa(int isa) {
  switch (isa) {
    case ZO_SCALAR: return true;
#if ZO_X86
    case ZO_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case ZO_AVX512:
      return has_isa(ZO_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif ZO_ARM
    case ZO_NEON: return true;  // every such CPU has it
#endif
    default: return false;
  }
}

zo_kernels kernels_of(int isa) {
#if ZO_X86
  if (isa == ZO_AVX512) return zo_kernels_avx512();
  if (isa == ZO_AVX2) return zo_kernels_avx2();
#elif ZO_ARM
  if (isa == ZO_NEON) return zo_kernels_neon();
#endif
  return zo_kernels_scalar();
}

zo_u32 tag_of(zo_u32 distribution) {
  return distribution == ZO_RADEMACHER    ? ZO_TAG_RADEMACHER
         : distribution == ZO_BOX_MULLER ? ZO_TAG_BOX_MULLER
                                         : ZO_TAG_GAUSSIAN;
}

void make_key(zo_key* key, zo_u64 seed, zo_u32 param_id, zo_u32 tag) {
  zo_u32 k0 = (zo_u32)seed, k1 = (zo_u32)(seed >> 32);
  for (int r = 0; r < 10; ++r) {
    key->k0[r] = k0;
    key->k1[r] = k1;
    k0 += ZO_PHILOX_W0;
    k1 += ZO_PHILOX_W1;
  }
  key->param_id = param_id;
  key->tag = tag;
  key->fresh = 1;
  key->columns = nullptr;
}

zo_u64 seed_of(const zo_key& key) { return key.k0[0] | key.k1[0] << 32; }

// The factors V of a pass's directions, one for each upper half of a seed, made before the pass: they are few numbers.
class Columns {
 public:
  Columns(const zo_pass& pass, const zo_kernels& kernels) : pass_(pass), noise_(kernels.noise[pass.rounds == 10]) {}
  ~Columns() {
    while (made_) {
      One* before = made_->before;
      delete[] made_->v;
      delete made_;
      made_ = before;
    }
  }

  // Gives each key the V of its direction; false if there is no memory.
  bool give(zo_key* keys, zo_u32 count) {
    for (zo_u32 k = 0; k < count; ++k)
      if (keys[k].fresh && !(keys[k].columns = of(seed_of(keys[k]) >> 32 << 32))) return false;
    return true;
  }

 private:
  struct One {
    zo_u64 seed;
    float* v;
    One* before;
  };

  const float* of(zo_u64 seed) {
    for (One* one = made_; one; one = one->before)
      if (one->seed == seed) return one->v;
    const zo_u64 numel = (zo_u64)pass_.rank * pass_.columns, beyond = 64;  // whole vectors are read at the end
    float* v = new (std::nothrow) float[numel + beyond]();
    One* one = v ? new (std::nothrow) One{seed, v, made_} : nullptr;
    if (!one) {
      delete[] v;
      return nullptr;
    }
    made_ = one;
    StandardFloat guard;
    zo_key key;
    make_key(&key, seed, pass_.param_id, ZO_TAG_COLUMNS);
    noise_(&key, 0, numel, v);
    return v;
  }

  const zo_pass& pass_;
  void (*noise_)(const zo_key*, zo_u64, zo_u64, float*);
  One* made_ = nullptr;
};

// Noise, and for stochastic rounding random bits, of every update; noise of every term, and of every lane whose seed is a
// new one.
bool make_keys(const zo_pass& pass, zo_work* work, zo_key* keys, Columns& columns) {
  const zo_u32 tag = tag_of(pass.distribution);
  work->tag = (int)tag;
  work->update_keys = keys;
  for (zo_u32 k = 0; k < pass.num_updates; ++k) make_key(keys++, work->updates[k].seed, pass.param_id, tag);
  if (pass.rank && !columns.give(keys - pass.num_updates, pass.num_updates)) return false;
  work->rounding_keys = keys;
  if (pass.flags & ZO_STOCHASTIC)
    for (zo_u32 k = 0; k < pass.num_updates; ++k)
      make_key(keys++, work->updates[k].seed, pass.param_id, ZO_TAG_ROUNDING);
  work->mask_key = keys;
  if (pass.mask == ZO_MASK_RANDOM) make_key(keys++, pass.mask_seed, pass.param_id, ZO_TAG_MASK);
  work->term_keys = keys;
  for (zo_u32 k = 0; k < pass.num_terms; ++k) make_key(keys++, work->terms[k].seed, pass.param_id, tag);
  if (pass.rank && !columns.give(keys - pass.num_terms, pass.num_terms)) return false;
  work->lane_keys = keys;
  const zo_lane* made = nullptr;  // whose noise is there
  zo_u64 bytes = 0;
  for (zo_u32 j = 0; j < pass.num_lanes; ++j, ++keys) {
    const zo_lane& lane = work->lanes[j];
    const zo_u32 sum = lane.format & ZO_LANE_SUM;
    bytes += pass.numel * zo_format_bytes((int)(lane.format ^ sum));
    keys->fresh = 0;
    if (lane.scale == 0.0f || (made && made->seed == lane.seed && (made->format & ZO_LANE_SUM) == sum)) continue;
    keys->fresh = 1;
    if (!sum) make_key(keys, lane.seed, pass.param_id, tag);
    if (pass.rank && !sum && !columns.give(keys, 1)) return false;
    made = &lane;
  }
  work->past_cache = !pass.rows && bytes > PAST_CACHE;
  return true;
}

struct Job {
  const zo_work* work;
  void (*segment)(const zo_work*, zo_u64, zo_u64, zo_u64);
  void (*noise)(const zo_key*, zo_u64, zo_u64, float*);
  void (*encode)(const zo_work*, zo_u64, zo_u64, zo_u64*);
  std::atomic<zo_u64>* not_finite;
  const zo_key* key;
  float* out;
  zo_u64 begin, end, chunk, rows_per_chunk;
};

// Whoever takes the last chunk makes the others wait: many chunks a thread, so that this wait is a few percent.
zo_u64 chunk_size(zo_u64 elements, int threads) {
  zo_u64 size = MAX_CHUNK;
  while (size > MIN_CHUNK && elements < 32 * size * (zo_u64)threads) size /= 2;
  return size;
}

// Chunk c of the elements [begin, end): cut at multiples of the chunk size of the element index, so tiles stay aligned.
void chunk_range(const Job& job, zo_u64 c, zo_u64* from, zo_u64* to) {
  const zo_u64 base = (job.begin & ~(job.chunk - 1)) + c * job.chunk;
  *from = base < job.begin ? job.begin : base;
  *to = base + job.chunk < job.end ? base + job.chunk : job.end;
}

void pass_chunk(void* context, uint64_t c) {
  const Job& job = *(const Job*)context;
  StandardFloat guard;
  zo_u64 from, to;
  chunk_range(job, c, &from, &to);
  job.segment(job.work, from, to - from, from - job.begin);
  if (job.work->past_cache) order_stores();
}

void rows_chunk(void* context, uint64_t c) {
  const Job& job = *(const Job*)context;
  const zo_pass& pass = *job.work->pass;
  StandardFloat guard;
  const zo_u64 last = (c + 1) * job.rows_per_chunk;
  for (zo_u64 u = c * job.rows_per_chunk; u < last && u < pass.num_rows; ++u) {
    const zo_u64 from = (zo_u64)pass.rows[u] * pass.numel;
    if (from - pass.offset < pass.total) job.segment(job.work, from, pass.numel, u * pass.numel);  // else another piece's
  }
}

void noise_chunk(void* context, uint64_t c) {
  const Job& job = *(const Job*)context;
  StandardFloat guard;
  zo_u64 from, to;
  chunk_range(job, c, &from, &to);
  job.noise(job.key, from, to - from, job.out + (from - job.begin));
}

void encode_chunk(void* context, uint64_t c) {
  const Job& job = *(const Job*)context;
  StandardFloat guard;
  zo_u64 from, to, found[2] = {0, 0};
  chunk_range(job, c, &from, &to);
  job.encode(job.work, from, to - from, found);
  for (int i = 0; i < 2; ++i) job.not_finite[i].fetch_add(found[i], std::memory_order_relaxed);
}

// Cuts [begin, end) into chunks and runs them; `streams`: how many noises and outputs an element costs.
void run_range(Job& job, zo::ChunkFn fn, zo_u64 begin, zo_u64 numel, zo_u64 streams, int threads) {
  if (numel == 0) return;
  if (threads < 1 || numel * streams < SMALL) threads = 1;
  job.begin = begin;
  job.end = begin + numel;
  job.chunk = chunk_size(numel, threads);
  zo::run(fn, &job, (job.end - (begin & ~(job.chunk - 1)) + job.chunk - 1) / job.chunk, threads);
}

void run_rows(Job& job, const zo_pass& pass, zo_u64 streams, int threads) {
  const zo_u64 numel = pass.num_rows * pass.numel;
  if (numel == 0) return;
  if (threads < 1 || numel * streams < SMALL) threads = 1;
  job.rows_per_chunk = (chunk_size(numel, threads) + pass.numel - 1) / pass.numel;
  zo::run(rows_chunk, &job, (pass.num_rows + job.rows_per_chunk - 1) / job.rows_per_chunk, threads);
}

bool format_fits(const zo_pass& pass, bool folds) {
  if (pass.format >= ZO_NUM_FORMATS) return false;
  const int format = (int)pass.format;
  const bool empty = pass.total == 0;  // then nothing has an address
  if (zo_scale_bytes(format) && !(pass.scales || empty)) return false;
  if (zo_own_scale_bytes(format)) {
    if (!zo_is_group(pass.group) || pass.offset % pass.group) return false;
  } else if (pass.group != 0) {
    return false;
  }
  if (format == ZO_MXFP4_ACROSS) {
    if (pass.across == 0 || pass.across % 8 || pass.offset % ((zo_u64)ZO_BAND * pass.across)) return false;
  } else if (pass.across != 0) {
    return false;
  }
  if (format == ZO_NVFP4_TWO && (pass.group != 16 || pass.offset % ZO_TWO)) return false;
  if (zo_minimum_bytes(format) && !(pass.minima || empty)) return false;
  if (pass.flags & ZO_TARGET_SCALES) return zo_trains_scales(format);
  if (zo_residual_bytes(format) && !(pass.residual || empty) && (folds || pass.flags & ZO_MASTER)) return false;
  return zo_trains(format) || !folds;
}

int check(const zo_pass& pass, const zo_work& work, int isa) {
  if (!has_isa(isa)) return ZO_ERROR_ISA;
  if (!format_fits(pass, work.last_fold >= 0)) return ZO_ERROR_FORMAT;
  for (zo_u32 j = 0; j < pass.num_lanes; ++j) {
    const zo_lane& lane = work.lanes[j];
    if (!zo_is_plain((int)(lane.format & ~(zo_u32)ZO_LANE_SUM))) return ZO_ERROR_FORMAT;
    if (lane.format & ZO_LANE_SUM && (zo_u32)lane.seed + (lane.seed >> 32) > pass.num_terms) return ZO_ERROR_TERMS;
  }
  if (pass.distribution >= ZO_NUM_NOISES || (pass.rounds != 7 && pass.rounds != 10)) return ZO_ERROR_NOISE;
  if (pass.rank && (pass.rank > ZO_MOST_RANK || !pass.columns || pass.distribution != ZO_GAUSSIAN ||
                    pass.flags & ZO_TARGET_SCALES))
    return ZO_ERROR_NOISE;
  if (pass.mask >= ZO_NUM_MASKS || (pass.mask && pass.flags & ZO_TARGET_SCALES)) return ZO_ERROR_MASK;
  return ZO_OK;
}

zo_work work_of(const zo_pass* pass) {
  zo_work work = {};
  work.pass = pass;
  work.updates = pass->updates ? pass->updates : (const zo_update*)(pass + 1);
  work.terms = pass->terms ? pass->terms : work.updates + pass->num_updates;
  work.lanes = pass->lanes ? pass->lanes : (const zo_lane*)(work.terms + pass->num_terms);
  work.last_fold = zo_last_fold(work.updates, pass->num_updates);
  return work;
}

int run_pass(zo_work work, int isa, int threads) {
  const zo_pass* pass = work.pass;
  zo_key few[16];
  const zo_u64 num_keys = 2 * (zo_u64)pass->num_updates + pass->num_terms + pass->num_lanes + 1;
  zo_key* keys = num_keys <= 16 ? few : new (std::nothrow) zo_key[num_keys];
  if (!keys) return ZO_ERROR_MEMORY;
  const zo_kernels kernels = kernels_of(isa);
  Columns columns(*pass, kernels);
  if (!make_keys(*pass, &work, keys, columns)) {
    if (keys != few) delete[] keys;
    return ZO_ERROR_MEMORY;
  }

  Job job = {};
  job.work = &work;
  job.segment = (pass->flags & ZO_TARGET_SCALES ? kernels.scales : kernels.segment)[pass->rounds == 10];
  const zo_u64 streams = 1 + pass->num_updates + pass->num_terms + pass->num_lanes;
  if (pass->rows)
    run_rows(job, *pass, streams, threads);
  else
    run_range(job, pass_chunk, pass->offset, pass->numel, streams, threads);
  if (keys != few) delete[] keys;
  return ZO_OK;
}

}  // namespace

int zo_cpu_pass(const zo_pass* pass, int isa, int threads) {
  const zo_work work = work_of(pass);
  const int error = check(*pass, work, isa);
  return error ? error : run_pass(work, isa, threads);
}

int zo_cpu_passes(const zo_pass* passes, zo_u32 count, int isa, int threads) {
  const zo_pass* pass = passes;
  for (zo_u32 i = 0; i < count; ++i) {
    const zo_work work = work_of(pass);
    if (int error = check(*pass, work, isa)) return error;
    pass = (const zo_pass*)(work.lanes + pass->num_lanes);
  }
  pass = passes;
  for (zo_u32 i = 0; i < count; ++i) {
    const zo_work work = work_of(pass);
    if (int error = run_pass(work, isa, threads)) return error;
    pass = (const zo_pass*)(work.lanes + pass->num_lanes);
  }
  return ZO_OK;
}

int zo_cpu_encode(const zo_pass* pass, const void* values, zo_u32 values_format, zo_u64* not_finite, int isa,
                  int threads) {
  if (!has_isa(isa)) return ZO_ERROR_ISA;
  if (!format_fits(*pass, false) || zo_is_kept((int)pass->format) || (zo_residual_bytes((int)pass->format) && !pass->residual && pass->total) || pass->rows ||
      !zo_is_plain((int)values_format))
    return ZO_ERROR_FORMAT;
  zo_work work = {};
  work.pass = pass;
  work.values = values;
  work.values_format = values_format;
  std::atomic<zo_u64> found[2] = {{0}, {0}};
  Job job = {};
  job.work = &work;
  job.encode = kernels_of(isa).encode;
  job.not_finite = found;
  run_range(job, encode_chunk, pass->offset, pass->numel, 1, threads);
  for (int i = 0; i < 2; ++i) not_finite[i] = found[i];
  return ZO_OK;
}

int zo_cpu_noise(float* out, zo_u64 numel, zo_u64 offset, zo_u64 seed, zo_u32 param_id, zo_u32 distribution,
                 zo_u32 rounds, int isa, int threads) {
  if (!has_isa(isa)) return ZO_ERROR_ISA;
  if (distribution >= ZO_NUM_NOISES || (rounds != 7 && rounds != 10)) return ZO_ERROR_NOISE;
  zo_key key;
  make_key(&key, seed, param_id, tag_of(distribution));
  Job job = {};
  job.noise = kernels_of(isa).noise[rounds == 10];
  job.key = &key;
  job.out = out;
  run_range(job, noise_chunk, offset, numel, 1, threads);
  return ZO_OK;
}

int zo_cpu_gaussian_table(float* out, int isa) {
  if (!has_isa(isa)) return ZO_ERROR_ISA;
  StandardFloat guard;
  kernels_of(isa).gaussian_table(out);
  return ZO_OK;
}

int zo_cpu_philox(const zo_u32* counter, const zo_u32* key, zo_u32 rounds, zo_u32* out) {
  const zo_u64 block = counter[0] | (zo_u64)counter[1] << 32, seed = key[0] | (zo_u64)key[1] << 32;
  if (rounds != 7 && rounds != 10) return ZO_ERROR_NOISE;
  zo_words w = rounds == 7 ? zo_philox<7>(block, counter[2], counter[3], seed)
                           : zo_philox<10>(block, counter[2], counter[3], seed);
  for (int i = 0; i < 4; ++i) out[i] = w.w[i];
  return ZO_OK;
}

void zo_cpu_share_threads(void (*parallel)(void (*)(void*), void*, unsigned, unsigned), int (*max_threads)(void)) {
  static const int once = pthread_atfork(nullptr, nullptr, [] {  // the child has none of the runtime's threads
    zo::shared().parallel = nullptr;
    pthread_mutex_init(&zo::shared().busy, nullptr);
  });
  (void)once;
  zo::shared().max_threads = max_threads;
  zo::shared().parallel = max_threads ? parallel : nullptr;
}

int zo_cpu_format(zo_u32 format, zo_u32* facts) {
  if (format >= ZO_NUM_FORMATS) return ZO_ERROR_FORMAT;
  const int f = (int)format;
  const int said[ZO_FORMAT_FACTS] = {zo_format_bits(f),    zo_scale_bytes(f), zo_minimum_bytes(f),
                                     zo_residual_bytes(f), zo_trains(f),      zo_trains_scales(f)};
  for (int i = 0; i < ZO_FORMAT_FACTS; ++i) facts[i] = (zo_u32)said[i];
  return ZO_OK;
}

zo_u32 zo_cpu_isas(void) {
  zo_u32 mask = 0;
  for (int isa = 0; isa < ZO_NUM_ISAS; ++isa)
    if (has_isa(isa)) mask |= 1u << isa;
  return mask;
}

zo_u32 zo_abi_version(void) { return ZO_ABI_VERSION; }
zo_u32 zo_layout_version(void) { return ZO_LAYOUT_VERSION; }
