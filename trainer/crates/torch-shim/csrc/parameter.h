// A parameter as the fused operators see it: its weight, its gradient accumulator, and whom to tell when that is ready.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>

#include "closure.h"

namespace phalanx {

// Weight gradients that wait (the W of a zero-bubble schedule), in the order in which they came up.
struct Deferred : torch::CustomClassHolder {
  std::vector<std::function<void()>> tasks;
  void run() {
    auto own = std::move(tasks);
    tasks.clear();
    for (auto& task : own) task();
  }
};

// The hook of a parameter set; shared by its parameters, replaceable at any time.
struct ReadyHook : torch::CustomClassHolder {
  std::mutex mutex;
  void* context = nullptr;
  phx_ready function = nullptr;
  phx_drop drop = nullptr;
  c10::intrusive_ptr<Deferred> deferred;  // where weight gradients go instead of being made; null: nowhere
  ~ReadyHook() override { clear(); }

  void clear() {
    std::lock_guard<std::mutex> lock(mutex);
    if (context) drop(context);
    context = nullptr;
  }
  void set(void* new_context, phx_ready new_function, phx_drop new_drop) {
    clear();
    std::lock_guard<std::mutex> lock(mutex);
    context = new_context;
    function = new_function;
    drop = new_drop;
  }
  void call(size_t index) {
    std::lock_guard<std::mutex> lock(mutex);
    if (context) raise_if(function(context, index));
  }
};

struct Parameter : torch::CustomClassHolder {
  at::Tensor weight;    // compute dtype, a leaf that requires a gradient
  at::Tensor gradient;  // FP32 or FP64, added to in place
  size_t index = 0;
  c10::intrusive_ptr<ReadyHook> hook;
  std::atomic<int64_t> pending{0};  // uses in living graphs whose backward has not run
};

using ParameterPtr = c10::intrusive_ptr<Parameter>;

// One use of a parameter in a graph. The gradient is ready when the last use in living graphs has run its backward; a
// graph that is dropped without a backward gives its use back silently.
struct Use : torch::CustomClassHolder {
  ParameterPtr parameter;
  bool open;
  Use(ParameterPtr parameter, bool open) : parameter(std::move(parameter)), open(open) {
    if (open) this->parameter->pending++;
  }
  ~Use() override {
    if (open) parameter->pending--;
  }
  void done() {
    if (auto& deferred = parameter->hook->deferred) {
      deferred->tasks.push_back([self = share()] { self->close(); });
    } else {
      close();
    }
  }
  // Adds dy^T x, now or when the deferred gradients are made.
  void accumulate(const at::Tensor& dy, const at::Tensor& x);

 private:
  c10::intrusive_ptr<Use> share() { return c10::intrusive_ptr<Use>::reclaim_copy(this); }
  void close() {
    if (!open) return;
    open = false;
    if (--parameter->pending == 0) parameter->hook->call(parameter->index);
  }
};

// Adds rows to those of an accumulator that `index` names, in one order.
void accumulate_rows(at::Tensor& accumulator, const at::Tensor& index, const at::Tensor& rows);

// Adds the product a^T b (a: [tokens, rows], b: [tokens, columns]) to an accumulator of FP32 or FP64.
void accumulate_product(at::Tensor& accumulator, const at::Tensor& a, const at::Tensor& b);

}  // namespace phalanx
