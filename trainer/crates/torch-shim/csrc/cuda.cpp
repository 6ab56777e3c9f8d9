// GPUs, reached without any CUDA header: libtorch_cuda is loaded at run time, and registers itself with libc10.
#include <ATen/Context.h>
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

}  // namespace

extern "C" {

// Loads libtorch's CUDA part where the dynamic linker finds it; `devices` is what it can use.
char* phx_cuda_load(int* devices) {
  *devices = 0;
  if (!dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL)) {
    const char* error = dlerror();
    return phalanx::error_text(error ? error : "libtorch_cuda.so cannot be loaded");
  }
  return guarded([&] {
    *devices = guard().deviceCount();
    if (*devices > 0) at::globalContext().lazyInitDevice(c10::kCUDA);
  });
}

char* phx_cuda_set_device(int index) {
  return guarded([&] { guard().setDevice(gpu(index)); });
}

char* phx_cuda_synchronize(int index) {
  return guarded([&] { guard().synchronizeDevice(static_cast<c10::DeviceIndex>(index)); });
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

// Marks the end of what is on this thread's current stream now.
char* phx_event_on_current(int index, c10::Event** out) {
  return guarded([&] {
    auto event = std::make_unique<c10::Event>(c10::kCUDA);
    event->record(guard().getStream(gpu(index)));
    *out = event.release();
  });
}

// Marks the end of what is on `stream` now.
char* phx_event_on(const c10::Stream* stream, c10::Event** out) {
  return guarded([&] {
    auto event = std::make_unique<c10::Event>(c10::kCUDA);
    event->record(*stream);
    *out = event.release();
  });
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

// The allocator gives the tensor's memory to nobody else until what is on `stream` when the tensor goes has passed.
char* phx_tensor_record_stream(const Tensor* tensor, const c10::Stream* stream) {
  return guarded([&] { tensor->record_stream(*stream); });
}

}  // extern "C"
