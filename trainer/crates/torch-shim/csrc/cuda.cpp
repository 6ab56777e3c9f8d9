// GPUs, reached without any CUDA header: libtorch_cuda is loaded at run time, and registers itself with libc10.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/AllocatorConfig.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include "common.h"

using at::Tensor;
using phalanx::guarded;

namespace {

c10::Device gpu(int index) { return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index)); }

c10::impl::VirtualGuardImpl guard() { return c10::impl::VirtualGuardImpl(c10::kCUDA); }

c10::DeviceAllocator* allocator() { return c10::getDeviceAllocator(c10::kCUDA); }

c10::Event* event_on(const c10::Stream& stream, c10::EventFlag flag) {
  auto event = std::make_unique<c10::Event>(c10::kCUDA, flag);
  event->record(stream);
  return event.release();
}

}  // namespace

extern "C" {

// Loads libtorch's CUDA part where the dynamic linker finds it. `runtime` is the CUDA that it was built with: 13000 for 13.0.
char* phx_cuda_load(int* runtime) {
  *runtime = 0;
  if (!dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL)) {
    const char* error = dlerror();
    return phalanx::error_text(error ? error : "libtorch_cuda.so cannot be loaded");
  }
  return guarded([&] { *runtime = static_cast<int>(at::detail::getCUDAHooks().versionCUDART()); });
}

// Starts CUDA; `devices` is how many GPUs libtorch can use. Where there is none, the error says why.
char* phx_cuda_start(int* devices) {
  *devices = 0;
  return guarded([&] {
    int count = guard().deviceCount();
    at::globalContext().lazyInitDevice(c10::kCUDA);
    *devices = count;
  });
}

// The settings of the allocator, in the words of PYTORCH_ALLOC_CONF; before it has given out any memory.
char* phx_cuda_allocator(const char* settings) {
  return guarded([&] { c10::CachingAllocator::setAllocatorSettings(settings); });
}

// Lets a GPU add two numbers: a kernel must have been compiled for it.
char* phx_cuda_probe(int index) {
  return guarded([&] {
    auto one = at::ones({1}, at::TensorOptions().device(gpu(index)).dtype(at::kFloat));
    auto sum = one.add(one).item<float>();
    TORCH_CHECK(sum == 2.0f, "GPU ", index, " adds 1 and 1 to ", sum);
  });
}

// Bytes: given out now and at most, taken from the GPU now and at most, free on the GPU, and all of it.
char* phx_cuda_memory(int index, int64_t* out) {
  return guarded([&] {
    auto device = static_cast<c10::DeviceIndex>(index);
    auto stats = allocator()->getDeviceStats(device);
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    out[0] = stats.allocated_bytes[all].current;
    out[1] = stats.allocated_bytes[all].peak;
    out[2] = stats.reserved_bytes[all].current;
    out[3] = stats.reserved_bytes[all].peak;
    auto [free, total] = allocator()->getMemoryInfo(device);
    out[4] = static_cast<int64_t>(free);
    out[5] = static_cast<int64_t>(total);
  });
}

char* phx_cuda_reset_peaks(int index) {
  return guarded([&] { allocator()->resetPeakStats(static_cast<c10::DeviceIndex>(index)); });
}

char* phx_cuda_set_device(int index) {
  return guarded([&] { guard().setDevice(gpu(index)); });
}

char* phx_cuda_synchronize(int index) {
  return guarded([&] { guard().synchronizeDevice(static_cast<c10::DeviceIndex>(index)); });
}

// A copy of a CPU tensor on a GPU, through memory that the GPU reads by itself: the host does not wait. libtorch's
// allocator of such memory keeps it until the copy is through.
char* phx_upload(Tensor* host, int index, Tensor** out) {
  return guarded([&] { *out = phalanx::give(host->pin_memory().to(gpu(index), /*non_blocking=*/true)); });
}

// A copy of a GPU's tensor in memory of the host that the GPU writes by itself. Its values are there once what is on the
// current stream now has passed.
char* phx_download(Tensor* tensor, Tensor** out) {
  return guarded([&] {
    auto host = at::empty(tensor->sizes(), tensor->options().device(at::kCPU).pinned_memory(true));
    host.copy_(*tensor, /*non_blocking=*/true);
    *out = phalanx::give(host);
  });
}

// One of libtorch's pool of streams, of high priority; never freed.
char* phx_stream_take(int index, c10::Stream** out) {
  return guarded([&] { *out = new c10::Stream(guard().getStreamFromGlobalPool(gpu(index), true)); });
}

void phx_stream_free(c10::Stream* stream) { delete stream; }

char* phx_stream_native(const c10::Stream* stream, void** out) {
  return guarded([&] { *out = stream->native_handle(); });
}

// This thread's current stream, as CUDA knows it; it lives as long as the process.
char* phx_stream_current(int index, void** out) {
  return guarded([&] { *out = guard().getStream(gpu(index)).native_handle(); });
}

// A number that tells the stream from others, as profilers show it.
int64_t phx_stream_id(const c10::Stream* stream) { return stream->id(); }

// Makes `stream` this thread's current one of its GPU; `out` was it before.
char* phx_stream_exchange(const c10::Stream* stream, c10::Stream** out) {
  return guarded([&] { *out = new c10::Stream(guard().exchangeStream(*stream)); });
}

// Marks the end of what is on this thread's current stream now; a timed one can say how long after another it was.
char* phx_event_on_current(int index, bool timed, c10::Event** out) {
  auto flag = timed ? c10::EventFlag::BACKEND_DEFAULT : c10::EventFlag::PYTORCH_DEFAULT;
  return guarded([&] { *out = event_on(guard().getStream(gpu(index)), flag); });
}

// Marks the end of what is on `stream` now.
char* phx_event_on(const c10::Stream* stream, bool timed, c10::Event** out) {
  auto flag = timed ? c10::EventFlag::BACKEND_DEFAULT : c10::EventFlag::PYTORCH_DEFAULT;
  return guarded([&] { *out = event_on(*stream, flag); });
}

void phx_event_free(c10::Event* event) { delete event; }

// Lets this thread's current stream wait for the event; the host does not.
char* phx_event_hold_current(const c10::Event* event) {
  return guarded([&] { event->block(guard().getStream(event->device())); });
}

char* phx_event_hold(const c10::Event* event, const c10::Stream* stream) {
  return guarded([&] { event->block(*stream); });
}

char* phx_event_is_past(const c10::Event* event, bool* out) {
  return guarded([&] { *out = event->query(); });
}

// Lets the host wait.
char* phx_event_wait(const c10::Event* event) {
  return guarded([&] { event->synchronize(); });
}

// Milliseconds from one timed event to another, both of them past.
char* phx_event_elapsed(const c10::Event* from, const c10::Event* to, double* out) {
  return guarded([&] { *out = from->elapsedTime(*to); });
}

// The allocator gives the tensor's memory to nobody else until what is on `stream` when the tensor goes has passed.
char* phx_tensor_record_stream(const Tensor* tensor, const c10::Stream* stream) {
  return guarded([&] { tensor->record_stream(*stream); });
}

}  // extern "C"
