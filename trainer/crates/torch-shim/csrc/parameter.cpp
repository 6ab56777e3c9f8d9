// Handles of parameters and of their ready hook.
#include "parameter.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/Allocator.h>

using at::Tensor;
using phalanx::guarded;
using phalanx::ReadyHook;

extern "C" {

char* phx_hook_new(ReadyHook** out) {
  return guarded([&] { *out = c10::make_intrusive<ReadyHook>().release(); });
}

char* phx_hook_set(ReadyHook* hook, void* context, phx_ready function, phx_drop drop) {
  return guarded([&] { hook->set(context, function, drop); });
}

char* phx_hook_clear(ReadyHook* hook) {
  return guarded([&] { hook->clear(); });
}

void phx_hook_free(ReadyHook* hook) { c10::intrusive_ptr<ReadyHook>::reclaim(hook); }

// The memory of a tensor that is all of its storage goes and comes back, while views and what autograd saved keep the
// same storage object.
char* phx_storage_release(Tensor* tensor) {
  return guarded([&] {
    auto* storage = tensor->storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(c10::DataPtr(nullptr, tensor->device()));
    storage->set_nbytes(0);
  });
}

char* phx_storage_allocate(Tensor* tensor) {
  return guarded([&] {
    auto* storage = tensor->storage().unsafeGetStorageImpl();
    size_t bytes = tensor->numel() * tensor->element_size();
    if (storage->nbytes() == bytes) return;
    storage->set_data_ptr_noswap(c10::GetAllocator(tensor->device().type())->allocate(bytes));
    storage->set_nbytes(bytes);
  });
}

char* phx_hook_defer(ReadyHook* hook) {
  return guarded([&] { hook->deferred = c10::make_intrusive<phalanx::Deferred>(); });
}

char* phx_hook_take_deferred(ReadyHook* hook, phalanx::Deferred** out) {
  return guarded([&] {
    TORCH_CHECK(hook->deferred, "no weight gradients are being deferred");
    *out = hook->deferred.release();
  });
}

char* phx_deferred_run(phalanx::Deferred* deferred) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    deferred->run();
  });
}

void phx_deferred_free(phalanx::Deferred* deferred) { c10::intrusive_ptr<phalanx::Deferred>::reclaim(deferred); }

char* phx_parameter_new(Tensor* weight, Tensor* gradient, size_t index, ReadyHook* hook,
                        phalanx::Parameter** out) {
  return guarded([&] {
    TORCH_CHECK(weight->sizes() == gradient->sizes(), "a weight of ", weight->sizes(), " with a gradient of ",
                gradient->sizes());
    auto parameter = c10::make_intrusive<phalanx::Parameter>();
    parameter->weight = *weight;
    parameter->gradient = *gradient;
    parameter->index = index;
    parameter->hook = c10::intrusive_ptr<ReadyHook>::reclaim_copy(hook);
    *out = parameter.release();
  });
}

phalanx::Parameter* phx_parameter_share(phalanx::Parameter* parameter) {
  return phalanx::ParameterPtr::reclaim_copy(parameter).release();
}

void phx_parameter_free(phalanx::Parameter* parameter) { phalanx::ParameterPtr::reclaim(parameter); }

}  // extern "C"
