// Chunks on several threads: those of the OpenMP runtime that torch computes with, else a small pool of our own.
//
// Torch's runtime is the better one where there is one: after each of its regions its threads spin for milliseconds,
// waiting for the next, and a second pool would have to share the cores with them (`benchmarks.threads`).
//
// The pool is for calls of tens of microseconds: workers spin briefly for the next job, then sleep. One job at a time;
// a caller that finds the pool busy (a second Python thread) does its own work alone. The calling thread takes part and
// never waits for a worker that has not started: `gate` lets workers in until the caller closes it, and only those
// inside are waited for. After fork() the child starts with an empty pool.
#ifndef ZO_CPU_THREADS_H
#define ZO_CPU_THREADS_H
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <new>

namespace zo {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

typedef void (*ChunkFn)(void* context, uint64_t chunk);

class Pool {
 public:
  // Runs fn(context, c) for every c in [0, chunks) on up to `threads` threads.
  void run(ChunkFn fn, void* context, uint64_t chunks, int threads) {
    if (threads > MAX_WORKERS + 1) threads = MAX_WORKERS + 1;
    if (chunks < (uint64_t)threads) threads = (int)chunks;
    if (threads <= 1 || pthread_mutex_trylock(&busy_) != 0) {
      for (uint64_t c = 0; c < chunks; ++c) fn(context, c);
      return;
    }
    while (workers_ < threads - 1 && start_worker()) ++workers_;
    fn_ = fn;
    context_ = context;
    chunks_ = chunks;
    next_.store(0, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    const uint64_t generation = (gate_.load(std::memory_order_relaxed) >> 32) + 1;
    gate_.store(generation << 32 | (uint64_t)(threads - 1) << 16, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst) > 0) {
      pthread_mutex_lock(&sleep_);
      pthread_cond_broadcast(&wake_);
      pthread_mutex_unlock(&sleep_);
    }
    work();
    const uint64_t joined = gate_.fetch_or(CLOSED, std::memory_order_acq_rel) & COUNT;
    for (int spins = 0; finished_.load(std::memory_order_acquire) != joined; ++spins)
      spins < SPINS ? pause() : (void)sched_yield();  // they are inside their last chunk
    pthread_mutex_unlock(&busy_);
  }

 private:
  enum { MAX_WORKERS = 255, SPINS = 2000 };
  static const uint64_t COUNT = 0x7fff, CLOSED = 0x8000;  // gate: generation 32 | limit 16 | closed 1 | joined 15

  void work() {
    for (uint64_t c; (c = next_.fetch_add(1, std::memory_order_relaxed)) < chunks_;) fn_(context_, c);
  }

  // Waits for a gate newer than `seen` that still lets someone in, and goes in.
  uint64_t join(uint64_t seen) {
    for (int spins = 0;; ++spins) {
      uint64_t gate = gate_.load(std::memory_order_acquire);
      while (gate >> 32 != seen && !(gate & CLOSED) && (gate & COUNT) < (gate >> 16 & 0xffff))
        if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) return gate >> 32;
      if (spins < SPINS) {
        pause();
        continue;
      }
      pthread_mutex_lock(&sleep_);
      asleep_.fetch_add(1, std::memory_order_seq_cst);
      // a job published before `asleep_` was seen must be noticed here, one published after it broadcasts
      uint64_t now = gate_.load(std::memory_order_seq_cst);
      if (now >> 32 == gate >> 32) pthread_cond_wait(&wake_, &sleep_);
      asleep_.fetch_sub(1, std::memory_order_seq_cst);
      pthread_mutex_unlock(&sleep_);
      spins = 0;
    }
  }

  static void* worker(void* self) {
    Pool* pool = (Pool*)self;
    uint64_t seen = 0;
    for (;;) {
      seen = pool->join(seen);
      pool->work();
      pool->finished_.fetch_add(1, std::memory_order_release);
    }
    return nullptr;
  }

  bool start_worker() {
    pthread_t thread;
    if (pthread_create(&thread, nullptr, worker, this) != 0) return false;
    pthread_detach(thread);
    return true;
  }

  pthread_mutex_t busy_ = PTHREAD_MUTEX_INITIALIZER, sleep_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER;
  int workers_ = 0;  // guarded by busy_
  ChunkFn fn_ = nullptr;
  void* context_ = nullptr;
  uint64_t chunks_ = 0;
  alignas(64) std::atomic<uint64_t> gate_{CLOSED};
  alignas(64) std::atomic<uint64_t> next_{0};
  alignas(64) std::atomic<uint64_t> finished_{0};
  std::atomic<int> asleep_{0};
};

// Never destroyed: its detached workers outlive static destructors.
inline Pool& pool() {
  alignas(Pool) static unsigned char storage[sizeof(Pool)];
  static Pool* instance = [] {
    pthread_atfork(nullptr, nullptr, [] { new (storage) Pool; });
    return new (storage) Pool;
  }();
  return *instance;
}

// The runtime that torch was linked with (`zo_cpu_share_threads`): GOMP_parallel, and omp_get_max_threads.
struct Shared {
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
  int (*max_threads)(void);
  pthread_mutex_t busy;
};

inline Shared& shared() {
  static Shared instance = {nullptr, nullptr, PTHREAD_MUTEX_INITIALIZER};
  return instance;
}

struct Chunks {
  ChunkFn fn;
  void* context;
  uint64_t count;
  std::atomic<uint64_t> next;
};

inline void take_chunks(void* all) {
  Chunks& chunks = *(Chunks*)all;
  for (uint64_t c; (c = chunks.next.fetch_add(1, std::memory_order_relaxed)) < chunks.count;)
    chunks.fn(chunks.context, c);
}

// Runs fn(context, c) for every c in [0, chunks) on up to `threads` threads; returns when all have run.
inline void run(ChunkFn fn, void* context, uint64_t chunks, int threads) {
  Shared& with = shared();
  // another number of threads than torch's: the runtime would end threads and start them again at every call
  if (threads < 2 || chunks < 2 || !with.parallel || with.max_threads() != threads ||
      pthread_mutex_trylock(&with.busy) != 0) {
    pool().run(fn, context, chunks, threads);
    return;
  }
  Chunks all = {fn, context, chunks, {0}};
  with.parallel(take_chunks, &all, (unsigned)threads, 0);
  pthread_mutex_unlock(&with.busy);
}

}  // namespace zo

#endif
