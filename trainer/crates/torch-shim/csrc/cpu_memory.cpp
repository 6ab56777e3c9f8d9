// The memory of CPU tensors: kept for the next ones when they are dropped, and counted. A training step makes and drops the same tensors again and
// again; malloc gives large ones back to the kernel each time, and then pays a page fault for every 4 KiB. Large blocks come from the kernel with their
// pages there already, in one call and not by a fault for each, and are known to be zero.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "common.h"

namespace {

constexpr size_t kSmallest = 64 << 10;   // smaller blocks malloc keeps itself
constexpr size_t kMapped = 1 << 20;      // from here on blocks are the kernel's, not malloc's
constexpr size_t kPopulated = 64 << 20;  // bytes whose pages one thread asks for at a time
constexpr size_t kLargest = 256 << 20;   // larger ones are rare, and cost more memory than time
constexpr size_t kAlignment = 64;
constexpr int kPopulateWrite = 23;       // MADV_POPULATE_WRITE, Linux 5.14; where it is not known, pages come by faults

// The newest block of this thread that nothing was written to since the kernel made it, all zero.
thread_local void* fresh = nullptr;

void* map(size_t size, size_t used) {
  void* block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED) return nullptr;
  auto populate = [&](int64_t begin, int64_t end) {
    size_t from = begin * kPopulated, to = std::min(end * kPopulated, used);
    madvise(static_cast<char*>(block) + from, to - from, kPopulateWrite);
  };
  at::parallel_for(0, (used + kPopulated - 1) / kPopulated, 1, populate);
  return block;
}

class KeepingAllocator final : public c10::Allocator {
 public:
  explicit KeepingAllocator(size_t limit) : limit_(limit) {}

  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes ? take(bytes) : nullptr;
    return {block, block, &drop, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &drop; }

  void copy_data(void* target, const void* source, std::size_t count) const override {
    default_copy_data(target, source, count);
  }

  static KeepingAllocator* instance;

 private:
  static void drop(void* block) {
    if (block) instance->give_back(block);
  }

  // Rounded up to an eighth of its power of two, so that like sizes share blocks and at most an eighth is wasted.
  static size_t rounded(size_t bytes) {
    size_t step = kSmallest / 8;
    while (step * 16 <= bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  void* take(size_t bytes) {
    fresh = nullptr;
    bool kept = bytes >= kSmallest && bytes <= kLargest;
    size_t size = kept ? rounded(bytes) : bytes;
    if (kept) {
      std::lock_guard<std::mutex> lock(mutex_);
      auto& free = free_[size];
      if (!free.empty()) {
        void* block = free.back();
        free.pop_back();
        unused_ -= size;
        return block;
      }
    }
    void* block = nullptr;
    if (size >= kMapped) {
      fresh = block = map(size, bytes);
    } else if (posix_memalign(&block, kAlignment, size) != 0) {
      block = nullptr;
    }
    TORCH_CHECK(block, "no memory: a tensor of ", bytes, " bytes does not fit");
    if (size >= kSmallest) {
      std::lock_guard<std::mutex> lock(mutex_);
      size_[block] = size;
    }
    return block;
  }

  void give_back(void* block) {
    size_t size = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto found = size_.find(block);
      if (found != size_.end()) {
        size = found->second;
        if (size <= kLargest && unused_ + size <= limit_) {
          unused_ += size;
          free_[size].push_back(block);
          return;
        }
        size_.erase(found);
      }
    }
    if (size >= kMapped) {
      munmap(block, size);
    } else {
      std::free(block);
    }
  }

  std::mutex mutex_;
  std::unordered_map<void*, size_t> size_;
  std::unordered_map<size_t, std::vector<void*>> free_;
  size_t unused_ = 0, limit_;
};

KeepingAllocator* KeepingAllocator::instance = nullptr;

// Bytes of tensors that were made where it counted and are not dropped yet, and the most that they have been.
struct Meter {
  std::atomic<int64_t> now = 0, peak = 0;

  void add(int64_t bytes) {
    int64_t sum = now += bytes, most = peak;
    while (sum > most && !peak.compare_exchange_weak(most, sum)) {
    }
  }
};

using MeterPtr = std::shared_ptr<Meter>;

// What counts on this thread, if anything.
thread_local MeterPtr counting;

// Another allocator whose tensors are counted: when they are made by the thread's meter, and by the same one when they
// are dropped, on whatever thread.
class MeteringAllocator final : public c10::Allocator {
 public:
  explicit MeteringAllocator(c10::Allocator* inner) : inner_(inner), delete_(inner->raw_deleter()) {
    TORCH_CHECK(delete_, "the allocator of this process cannot be metered");
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* block = inner_->raw_allocate(bytes);
    if (block && counting) {
      counting->add(bytes);
      std::lock_guard<std::mutex> lock(mutex_);
      counted_[block] = {bytes, counting};
    }
    return {block, block, &drop, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &drop; }

  void copy_data(void* target, const void* source, std::size_t count) const override {
    default_copy_data(target, source, count);
  }

  static MeteringAllocator* instance;

 private:
  static void drop(void* block) {
    if (block) instance->give_back(block);
  }

  void give_back(void* block) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto found = counted_.find(block);
      if (found != counted_.end()) {
        found->second.second->add(-static_cast<int64_t>(found->second.first));
        counted_.erase(found);
      }
    }
    delete_(block);
  }

  c10::Allocator* inner_;
  c10::DeleterFnPtr delete_;
  std::mutex mutex_;
  std::unordered_map<void*, std::pair<size_t, MeterPtr>> counted_;
};

MeteringAllocator* MeteringAllocator::instance = nullptr;

}  // namespace

extern "C" {

char* phx_keep_cpu_memory(size_t limit) {
  return phalanx::guarded([&] {
    static std::once_flag once;
    std::call_once(once, [&] {
      KeepingAllocator::instance = new KeepingAllocator(limit);
      c10::SetCPUAllocator(KeepingAllocator::instance, 255);
    });
  });
}

// A CPU tensor of so many zero bytes; where the kernel just made its memory, nothing is written.
char* phx_zero_bytes(int64_t count, at::Tensor** out) {
  return phalanx::guarded([&] {
    fresh = nullptr;
    at::Tensor zeros = at::empty({count}, at::dtype(at::kByte));
    if (count == 0 || zeros.data_ptr() != fresh) zeros.zero_();
    *out = new at::Tensor(std::move(zeros));
  });
}

char* phx_meter_new(MeterPtr** out) {
  return phalanx::guarded([&] {
    static std::once_flag once;
    std::call_once(once, [&] {
      MeteringAllocator::instance = new MeteringAllocator(c10::GetCPUAllocator());
      c10::SetCPUAllocator(MeteringAllocator::instance, 255);
    });
    *out = new MeterPtr(std::make_shared<Meter>());
  });
}

// What counts on this thread from here on; null: nothing.
void phx_meter_count(MeterPtr* meter) { counting = meter ? *meter : nullptr; }

void phx_meter_read(MeterPtr* meter, int64_t* now, int64_t* peak) {
  *now = (*meter)->now;
  *peak = (*meter)->peak;
}

void phx_meter_free(MeterPtr* meter) { delete meter; }

}  // extern "C"
