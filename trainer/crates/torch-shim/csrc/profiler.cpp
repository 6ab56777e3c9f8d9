// libtorch's profiler (Kineto): what operators ran when, and on a GPU its kernels.
#include <ATen/record_function.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include "common.h"

using phalanx::guarded;

namespace {

// A range of the timeline with a name.
struct Range {
  std::string name;
  at::RecordFunction function{at::RecordScope::USER_SCOPE};
};

}  // namespace

extern "C" {

// Begins to record this thread's operators, and those of its backward passes; with `cuda`, the kernels too.
char* phx_profiler_start(bool cuda) {
  return guarded([&] {
    using namespace torch::profiler::impl;
    std::set<ActivityType> activities{ActivityType::CPU};
    if (cuda) activities.insert(ActivityType::CUDA);
    ProfilerConfig config(ProfilerState::KINETO);
    torch::autograd::profiler::prepareProfiler(config, activities);
    torch::autograd::profiler::enableProfiler(config, activities);
  });
}

// Ends it, on the thread that began it, and writes what was recorded to `path`, as JSON that Chrome's viewer reads.
char* phx_profiler_stop(const char* path) {
  return guarded([&] { torch::autograd::profiler::disableProfiler()->save(path); });
}

char* phx_range_begin(const char* name, Range** out) {
  return guarded([&] {
    auto range = std::make_unique<Range>();
    range->name = name;
    if (range->function.isActive()) range->function.before(std::string_view(range->name));
    *out = range.release();
  });
}

// On the thread that began it.
void phx_range_end(Range* range) { delete range; }

}  // extern "C"
