// A recorded run: operators in the order in which they ran, with no Python between them.
//
// Values lie in registers: the inputs come first, then constants and results as they are named. An operator is put
// together argument by argument, then closed by `call`; `finish` says what is returned, after which the program is only
// run. Runs share nothing but constants and spare memory, so that several threads may run one program at once.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <string>
#include <utility>
#include <vector>

#include "memory.h"

namespace gatedprune {
namespace {

using at::Tensor;

struct Argument {
  c10::IValue constant;
  enum { fixed, one, list, optional_list } kind = fixed;
  std::vector<int64_t> registers;  // −1: None
};

struct Instruction {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<int64_t> results;  // for each result of the operator how many tensors it is; −1: a tensor, no list
  int64_t first;                 // the register of the first
  std::vector<int64_t> done;     // registers that nobody reads any more
  Range ahead;                   // of a layer: the largest constant that is read between it and the next one
};

// Nothing is fetched for who calls an operator after the program, or instead of its rest.
struct Ahead {
  ~Ahead() { ahead() = {}; }
};

class Program : public torch::CustomClassHolder {
 public:
  explicit Program(int64_t inputs) : inputs_(inputs), registers_(inputs) {}

  int64_t constant(const Tensor& value) {
    constants_.emplace_back(registers_, value);
    return registers_++;
  }

  void tensor(int64_t at) { pending_.push_back({{}, Argument::one, {known(at)}}); }
  void tensors(const std::vector<int64_t>& at, bool optional) {
    for (int64_t i : at)
      if (i >= 0 || !optional) known(i);
    pending_.push_back({{}, optional ? Argument::optional_list : Argument::list, at});
  }
  // A number where a tensor may stand: it does not decide the type of the result.
  void number(const at::Scalar& value) {
    Tensor t = at::scalar_tensor(value, value.isFloatingPoint() ? at::kDouble : value.isBoolean() ? at::kBool : at::kLong);
    t.unsafeGetTensorImpl()->set_wrapped_number(true);
    tensor(constant(t));
  }
  template <typename T>
  void value(T v) {
    pending_.push_back({c10::IValue(std::move(v)), Argument::fixed, {}});
  }
  void none() { pending_.push_back({}); }

  // Ends an operator; returns the register of its first result.
  int64_t call(const std::string& name, const std::string& overload, const std::vector<int64_t>& results) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    TORCH_CHECK(pending_.size() == op.schema().arguments().size(), name, " takes ", op.schema().arguments().size(),
                " arguments, not ", pending_.size());
    TORCH_CHECK(results.size() == op.schema().returns().size(), name, " has ", op.schema().returns().size(), " results");
    instructions_.push_back({op, std::move(pending_), results, registers_, {}, {}});
    pending_.clear();
    for (int64_t n : results) registers_ += n < 0 ? 1 : n;
    return instructions_.back().first;
  }

  void finish(const std::vector<int64_t>& outputs) {
    for (int64_t i : outputs) known(i);
    outputs_ = outputs;
    std::vector<int64_t> last(registers_, -1);
    for (size_t i = 0; i < instructions_.size(); i++) {
      for (int64_t r = instructions_[i].first, n = 0; n < count(instructions_[i]); n++) last[r + n] = int64_t(i);
      for (const Argument& a : instructions_[i].arguments)
        for (int64_t r : a.registers)
          if (r >= 0) last[r] = int64_t(i);
    }
    look_ahead();
    for (int64_t r : outputs) last[r] = -1;
    for (int64_t r = 0; r < registers_; r++)
      if (last[r] >= 0) instructions_[last[r]].done.push_back(r);
  }

  std::vector<Tensor> run(const std::vector<Tensor>& inputs) const {
    TORCH_CHECK(int64_t(inputs.size()) == inputs_, "the program takes ", inputs_, " tensors, not ", inputs.size());
    at::AutoDispatchBelowADInplaceOrView guard;  // no gradients
    const Within memory(arena_);
    std::vector<Tensor> at(registers_);
    for (int64_t i = 0; i < inputs_; i++) at[i] = inputs[i];
    for (const auto& [r, value] : constants_) at[r] = value;
    torch::jit::Stack stack;
    const Ahead within;
    for (const Instruction& i : instructions_) {
      stack.clear();
      for (const Argument& a : i.arguments) push(a, at, stack);
      ahead() = i.ahead;
      i.op.callBoxed(stack);
      int64_t r = i.first;
      for (size_t n = 0; n < i.results.size(); n++) {
        if (i.results[n] < 0) {
          at[r++] = std::move(stack[n]).toTensor();
        } else {
          const std::vector<Tensor> several = stack[n].toTensorVector();
          TORCH_CHECK(int64_t(several.size()) == i.results[n], i.op.schema().name(), " has another number of results");
          for (const Tensor& t : several) at[r++] = t;
        }
      }
      for (int64_t d : i.done) at[d].reset();
    }
    std::vector<Tensor> found;
    for (int64_t r : outputs_) found.push_back(at[r]);
    return found;
  }

  int64_t size() const { return int64_t(instructions_.size()); }

 private:
  // Gates in the first place: nothing but a matrix, which the layer before has the time to fetch.
  void look_ahead() {
    std::vector<Range> constant(registers_);
    for (const auto& [r, value] : constants_)
      if (value.is_contiguous()) {
        const char* p = static_cast<const char*>(value.const_data_ptr());
        constant[r] = {p, p + value.nbytes()};
      }
    Range next;
    for (auto i = instructions_.rbegin(); i != instructions_.rend(); i++) {
      const std::string& name = i->op.schema().name();
      if (name.rfind("gatedprune::conv2d", 0) == 0 || name == "gatedprune::linear") {
        i->ahead = std::exchange(next, {});
        continue;
      }
      for (const Argument& a : i->arguments)
        for (int64_t r : a.registers)
          if (r >= 0 && constant[r].end - constant[r].begin > next.end - next.begin) next = constant[r];
    }
  }

  int64_t known(int64_t at) const {
    TORCH_CHECK_INDEX(at >= 0 && at < registers_, "register ", at, " is outside [0, ", registers_, ")");
    return at;
  }

  static int64_t count(const Instruction& i) {
    int64_t n = 0;
    for (int64_t r : i.results) n += r < 0 ? 1 : r;
    return n;
  }

  static void push(const Argument& a, const std::vector<Tensor>& at, torch::jit::Stack& stack) {
    switch (a.kind) {
      case Argument::fixed:
        stack.push_back(a.constant);
        return;
      case Argument::one:
        stack.emplace_back(at[a.registers[0]]);
        return;
      case Argument::list: {
        c10::List<Tensor> all;
        for (int64_t r : a.registers) all.push_back(at[r]);
        stack.emplace_back(std::move(all));
        return;
      }
      case Argument::optional_list: {
        c10::List<std::optional<Tensor>> all;
        for (int64_t r : a.registers) all.push_back(r < 0 ? std::nullopt : std::optional<Tensor>(at[r]));
        stack.emplace_back(std::move(all));
        return;
      }
    }
  }

  const int64_t inputs_;
  int64_t registers_;
  std::vector<std::pair<int64_t, Tensor>> constants_;
  std::vector<Argument> pending_;
  std::vector<Instruction> instructions_;
  std::vector<int64_t> outputs_;
  const std::shared_ptr<Arena> arena_ = std::make_shared<Arena>();
};

template <typename T>
void value(const c10::intrusive_ptr<Program>& self, T v) {
  self->value(std::move(v));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gatedprune, m) {
  m.class_<Program>("Program")
      .def(torch::init<int64_t>())
      .def("constant", &Program::constant)
      .def("tensor", &Program::tensor)
      .def("tensors", &Program::tensors)
      .def("number", &Program::number)
      .def("none", &Program::none)
      .def("integer", &value<int64_t>)
      .def("real", &value<double>)
      .def("truth", &value<bool>)
      .def("text", &value<std::string>)
      .def("integers", &value<std::vector<int64_t>>)
      .def("reals", &value<std::vector<double>>)
      .def("truths", &value<c10::List<bool>>)
      .def("scalar", &value<at::Scalar>)
      .def("dtype", &value<at::ScalarType>)
      .def("layout", &value<at::Layout>)
      .def("memory_format", &value<at::MemoryFormat>)
      .def("device", &value<at::Device>)
      .def("call", &Program::call)
      .def("finish", &Program::finish)
      .def("run", &Program::run)
      .def("size", &Program::size);
}

}  // namespace gatedprune
