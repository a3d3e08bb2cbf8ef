// Reads PTX text. Only what a compiler emits for one kernel at a time: no calls between device
// functions, no debug sections.
#include <cctype>
#include <fstream>
#include <sstream>

#include "machine.h"

namespace vgpu {
namespace {

bool is_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

std::string trim(const std::string& s) {
  const std::size_t b = s.find_first_not_of(" \t\r\n"), e = s.find_last_not_of(" \t\r\n");
  return b == std::string::npos ? "" : s.substr(b, e - b + 1);
}

int bits_of_type(const std::string& type) {
  if (type == "pred") return 1;
  const std::size_t digit = type.find_first_of("0123456789");
  if (digit == std::string::npos) throw std::runtime_error("PTX: unknown type ." + type);
  return std::stoi(type.substr(digit));
}

std::uint32_t round_up(std::uint32_t n, std::uint32_t to) { return (n + to - 1) / to * to; }

struct Register {
  std::uint32_t offset;
  int bits;
};

// Goes through the body of one kernel.
class KernelDecoder : public Decoder {
 public:
  KernelDecoder(const std::string& text, std::size_t begin, std::size_t end,
                const std::vector<std::string>& files, Kernel& kernel)
      : text_(text), at_(begin), end_(end), files_(files), kernel_(kernel) {
    scopes_.emplace_back();
  }

  void run() {
    header();
    body();
    for (const auto& [index, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) throw std::runtime_error("PTX: no label " + label);
      kernel_.code[index].target = found->second;
    }
  }

  std::uint32_t source(const Operand& op, int bits) override {
    if (op.kind == Operand::kRegister) return find(op.name).offset;
    if (op.kind == Operand::kImmediate) return constant(op.value, bits);
    if (op.kind == Operand::kSpecial) return special(op.name);
    if (op.kind == Operand::kSymbol) return constant(symbol(op.name), bits);
    throw std::runtime_error("PTX: an operand that cannot be read");
  }
  std::uint32_t destination(const Operand& op) override {
    if (op.kind == Operand::kSink) return scratch();
    if (op.kind != Operand::kRegister) throw std::runtime_error("PTX: not a destination");
    return find(op.name).offset;
  }
  std::uint32_t pair_destination(const Operand& op) override {
    return op.second.empty() || op.second == "_" ? 0 : find(op.second).offset;
  }
  int bits_of(const Operand& op) override {
    return op.kind == Operand::kRegister ? find(op.name).bits : 0;
  }
  std::uint32_t address(const Operand& op, Space space, std::int32_t* offset) override {
    const int bits = space == Space::kShared ? 32 : 64;
    *offset = static_cast<std::int32_t>(op.offset);
    if (op.name.empty()) return constant(0, bits);
    if (op.name[0] == '%') {
      const Register r = find(op.name);
      if (r.bits != bits)
        throw std::runtime_error("PTX: an address of " + std::to_string(r.bits) + " bits");
      return r.offset;
    }
    return constant(symbol(op.name), bits);
  }
  std::uint32_t branch_target(const Operand& op) override {
    branches_.emplace_back(kernel_.code.size(), op.name);
    return 0;
  }
  std::vector<std::uint32_t>& extra() override { return kernel_.extra; }

 private:
  void skip_space() {
    while (at_ < end_) {
      if (std::isspace(static_cast<unsigned char>(text_[at_]))) {
        ++at_;
      } else if (text_.compare(at_, 2, "//") == 0) {
        while (at_ < end_ && text_[at_] != '\n') ++at_;
      } else if (text_.compare(at_, 2, "/*") == 0) {
        at_ = text_.find("*/", at_) + 2;
      } else {
        return;
      }
    }
  }

  std::string until(const char* stops) {
    const std::size_t stop = text_.find_first_of(stops, at_);
    std::string s = text_.substr(at_, stop - at_);
    at_ = stop;
    return s;
  }

  // name(.param .align 8 .b8 a[120], .param .u64 b) .maxntid 128, 1, 1
  void header() {
    kernel_.name = trim(until("({"));
    if (text_[at_] == '(') {
      ++at_;
      std::istringstream list(until(")"));
      ++at_;
      std::string item;
      while (std::getline(list, item, ',')) {
        std::istringstream words(item);
        std::string word, type;
        std::uint32_t align = 0, count = 1;
        bool pointer = false;
        while (words >> word) {
          if (word == ".param") continue;
          if (word == ".align") {
            words >> align;
            if (pointer) align = 0;  // of what it points to
          } else if (word[0] == '.') {
            if (word == ".ptr") pointer = true;
            if (word != ".ptr" && word != ".global") type = word.substr(1);
          } else {
            const std::size_t bracket = word.find('[');
            if (bracket != std::string::npos) {
              count = static_cast<std::uint32_t>(std::stoul(word.substr(bracket + 1)));
              word.resize(bracket);
            }
            const auto bytes = static_cast<std::uint32_t>(bits_of_type(type) / 8);
            const std::uint32_t offset =
                round_up(kernel_.parameter_bytes, align == 0 ? bytes : align);
            kernel_.parameters.push_back({word, offset, bytes * count});
            kernel_.parameter_bytes = offset + bytes * count;
          }
        }
      }
    }
    std::istringstream rest(until("{"));
    std::string word;
    while (rest >> word) {
      if (word == ".maxntid") {
        std::string line;
        std::getline(rest, line);
        std::uint32_t product = 1;
        std::istringstream numbers(line);
        while (std::getline(numbers, word, ','))
          product *= static_cast<std::uint32_t>(std::stoul(word));
        kernel_.max_threads = product;
      } else if (word == ".minnctapersm") {
        rest >> kernel_.min_blocks;
      }
    }
  }

  void body() {
    int depth = 0;
    while (true) {
      skip_space();
      if (at_ >= end_) return;
      if (text_[at_] == '{') {
        ++at_;
        if (depth++ > 0) scopes_.emplace_back();
        continue;
      }
      if (text_[at_] == '}') {
        ++at_;
        if (--depth == 0) return;
        scopes_.pop_back();
        continue;
      }
      if (text_[at_] == '.') {
        directive();
        continue;
      }
      // A label?
      std::size_t p = at_;
      while (p < end_ && is_name(text_[p])) ++p;
      if (text_[p] == ':' && text_[at_] != '@') {
        labels_[text_.substr(at_, p - at_)] = static_cast<std::uint32_t>(kernel_.code.size());
        at_ = p + 1;
        continue;
      }
      const std::string statement = trim(until(";"));
      ++at_;
      if (!statement.empty()) instruction(statement);
    }
  }

  void directive() {
    if (text_.compare(at_, 5, ".loc ") == 0 || text_.compare(at_, 5, ".loc\t") == 0) {
      std::istringstream words(until("\n"));
      std::string skip;
      std::size_t file = 0, line = 0;
      words >> skip >> file >> line;
      const std::string name = file < files_.size() ? files_[file] : "?";
      place_ = name.substr(name.rfind('/') + 1) + ":" + std::to_string(line);
      return;
    }
    const std::string statement = trim(until(";"));
    ++at_;
    std::istringstream words(statement);
    std::string word;
    words >> word;
    if (word == ".pragma") return;
    if (word == ".reg") {
      std::string type, names;
      words >> type;
      std::getline(words, names);
      const int bits = bits_of_type(type.substr(1));
      std::istringstream list(names);
      while (std::getline(list, word, ',')) {
        word = trim(word);
        const std::size_t angle = word.find('<');
        if (angle == std::string::npos) {
          declare(word, bits);
          continue;
        }
        const int count = std::stoi(word.substr(angle + 1));
        for (int i = 0; i < count; ++i) declare(word.substr(0, angle) + std::to_string(i), bits);
      }
      return;
    }
    if (word == ".shared" || word == ".local") {
      const bool shared = word == ".shared";
      std::uint32_t align = 1, count = 1;
      std::string type = "b8";
      while (words >> word) {
        if (word == ".align") {
          words >> align;
        } else if (word[0] == '.') {
          type = word.substr(1);
        } else {
          const std::size_t bracket = word.find('[');
          if (bracket != std::string::npos) {
            count = static_cast<std::uint32_t>(std::stoul(word.substr(bracket + 1)));
            word.resize(bracket);
          }
          std::uint32_t& bytes = shared ? kernel_.shared_bytes : kernel_.local_bytes;
          bytes = round_up(bytes, align);
          symbols_[word] = (shared ? kSharedBase : 0u) + bytes;
          bytes += count * static_cast<std::uint32_t>(bits_of_type(type) / 8);
        }
      }
      return;
    }
    throw std::runtime_error("PTX: directive " + statement);
  }

  void declare(const std::string& name, int bits) { scopes_.back()[name] = {allocate(bits), bits}; }

  std::uint32_t allocate(int bits) {
    const std::uint32_t offset = kernel_.register_bytes;
    kernel_.register_bytes += bits == 64 ? 256 : bits == 32 ? 128 : 64;
    return offset;
  }

  Register find(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return found->second;
    }
    throw std::runtime_error("PTX: no register " + name);
  }

  std::uint32_t constant(std::uint64_t value, int bits) {
    if (bits < 64) value &= (1ull << bits) - 1;
    const auto [found, is_new] = constants_.try_emplace({bits, value}, 0);
    if (is_new) {
      found->second = allocate(bits);
      kernel_.constants.push_back(
          {found->second, static_cast<std::uint32_t>(bits == 1 ? 0 : bits / 8), value});
    }
    return found->second;
  }

  std::uint32_t special(const std::string& name) {
    const auto [found, is_new] = kernel_.special.try_emplace(name, 0);
    if (is_new) found->second = allocate(32);
    return found->second;
  }

  std::uint32_t scratch() {
    if (scratch_ == 0) scratch_ = allocate(64);
    return scratch_;
  }

  // The value of a name: of shared memory its address, of a parameter its offset.
  std::uint64_t symbol(const std::string& name) {
    const auto found = symbols_.find(name);
    if (found != symbols_.end()) return found->second;
    for (const Parameter& p : kernel_.parameters) {
      if (p.name == name) return p.offset;
    }
    // Dynamic shared memory is the only other symbol: an external array of the module.
    if (name.find("shared_memory") != std::string::npos || name == "global_smem") {
      kernel_.shared_bytes = round_up(kernel_.shared_bytes, 16);
      return kSharedBase + kernel_.shared_bytes;
    }
    throw std::runtime_error("PTX: unknown symbol " + name);
  }

  static bool is_special(const std::string& name) {
    return name.rfind("%tid", 0) == 0 || name.rfind("%ntid", 0) == 0 ||
           name.rfind("%ctaid", 0) == 0 || name.rfind("%nctaid", 0) == 0 || name == "%laneid" ||
           name == "%warpid" || name.rfind("%lanemask", 0) == 0;
  }

  static std::uint64_t number(const std::string& s) {
    if (s.size() == 10 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F'))
      return std::stoull(s.substr(2), nullptr, 16);
    if (s.size() == 18 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D'))
      return std::stoull(s.substr(2), nullptr, 16);
    if (s[0] == '-')
      return static_cast<std::uint64_t>(
          -static_cast<std::int64_t>(std::stoull(s.substr(1), nullptr, 0)));
    return std::stoull(s, nullptr, 0);
  }

  static Operand operand(std::string s) {
    s = trim(s);
    Operand op;
    if (s.empty()) throw std::runtime_error("PTX: an empty operand");
    if (s[0] == '{') {
      op.kind = Operand::kVector;
      std::istringstream list(s.substr(1, s.size() - 2));
      std::string item;
      while (std::getline(list, item, ',')) op.items.push_back(operand(item));
      return op;
    }
    if (s[0] == '[') {
      op.kind = Operand::kAddress;
      s = trim(s.substr(1, s.size() - 2));
      const std::size_t plus = s.find('+');
      op.name = trim(s.substr(0, plus));
      if (plus != std::string::npos)
        op.offset = static_cast<std::int64_t>(number(trim(s.substr(plus + 1))));
      if (std::isdigit(static_cast<unsigned char>(op.name[0])) || op.name[0] == '-') {
        op.offset += static_cast<std::int64_t>(number(op.name));
        op.name.clear();
      }
      return op;
    }
    if (s[0] == '!') {
      op = operand(s.substr(1));
      op.negated = true;
      return op;
    }
    const std::size_t bar = s.find('|');
    if (bar != std::string::npos) {
      op = operand(s.substr(0, bar));
      op.second = trim(s.substr(bar + 1));
      return op;
    }
    if (s == "_") return op;
    op.name = s;
    if (s[0] == '%') {
      op.kind = is_special(s) ? Operand::kSpecial : Operand::kRegister;
    } else if (std::isdigit(static_cast<unsigned char>(s[0])) || s[0] == '-') {
      op.kind = Operand::kImmediate;
      op.value = number(s);
    } else {
      op.kind = Operand::kSymbol;
    }
    return op;
  }

  void instruction(const std::string& statement) {
    Inst inst;
    std::size_t at = 0;
    if (statement[0] == '@') {
      at = statement.find_first_of(" \t");
      std::string guard = statement.substr(1, at - 1);
      if (guard[0] == '!') {
        inst.guard_not = 1;
        guard = guard.substr(1);
      }
      inst.guard = find(guard).offset;
      at = statement.find_first_not_of(" \t", at);
    }
    const std::size_t space = statement.find_first_of(" \t", at);
    const std::string opcode = statement.substr(at, space - at);
    std::vector<Operand> operands;
    if (space != std::string::npos) {
      std::string item;
      int depth = 0;
      for (std::size_t i = space; i < statement.size(); ++i) {
        const char c = statement[i];
        if (c == '{' || c == '[') ++depth;
        if (c == '}' || c == ']') --depth;
        if (c == ',' && depth == 0) {
          operands.push_back(operand(item));
          item.clear();
        } else {
          item += c;
        }
      }
      if (!trim(item).empty()) operands.push_back(operand(item));
    }
    try {
      decode(opcode, operands, *this, inst);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(error.what()) + " in '" + statement + "' of " +
                               kernel_.name);
    }
    kernel_.code.push_back(inst);
    kernel_.text.push_back(statement);
    kernel_.place.push_back(place_);
  }

  const std::string& text_;
  std::size_t at_, end_;
  const std::vector<std::string>& files_;
  Kernel& kernel_;
  std::vector<std::unordered_map<std::string, Register>> scopes_;
  std::unordered_map<std::string, std::uint32_t> labels_;
  std::unordered_map<std::string, std::uint64_t> symbols_;
  std::vector<std::pair<std::size_t, std::string>> branches_;
  std::map<std::pair<int, std::uint64_t>, std::uint32_t> constants_;
  std::string place_;
  std::uint32_t scratch_ = 0;
};

}  // namespace

void Program::add_module(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::stringstream content;
  content << file.rdbuf();
  auto text = std::make_shared<std::string>(content.str());
  auto files = std::make_shared<std::vector<std::string>>();
  std::string target;
  std::size_t at = text->find(".target");
  if (at != std::string::npos) target = trim(text->substr(at + 7, text->find('\n', at) - at - 7));
  // .file INDEX "name" stands at the start of a line.
  for (at = text->find("\n\t.file"); at != std::string::npos;
       at = text->find("\n\t.file", at + 1)) {
    std::istringstream words(text->substr(at + 7, text->find('\n', at + 1) - at - 7));
    std::size_t index = 0;
    std::string name;
    words >> index >> name;
    if (files->size() <= index) files->resize(index + 1);
    const std::size_t quote = name.find('"', 1);
    (*files)[index] = name.substr(1, quote - 1);
  }
  for (at = text->find(".entry"); at != std::string::npos; at = text->find(".entry", at + 1)) {
    const std::size_t begin = text->find_first_not_of(" \t", at + 6);
    std::size_t p = text->find('{', begin);
    const std::string name = trim(text->substr(begin, text->find_first_of("(\n{", begin) - begin));
    int depth = 0;
    for (;; ++p) {
      if ((*text)[p] == '{') ++depth;
      if ((*text)[p] == '}' && --depth == 0) break;
    }
    Entry& entry = entries_[name];
    entry.text = text;
    entry.begin = begin;
    entry.end = p + 1;
    entry.files = files;
    entry.target = target;
    entry.decoded.reset();
    at = p;
  }
}

const Kernel& Program::kernel(const std::string& name) {
  const auto found = entries_.find(name);
  if (found == entries_.end()) throw std::runtime_error("no PTX for kernel " + name);
  Entry& entry = found->second;
  if (entry.decoded == nullptr) {
    auto kernel = std::make_unique<Kernel>();
    kernel->target = entry.target;
    KernelDecoder(*entry.text, entry.begin, entry.end, *entry.files, *kernel).run();
    entry.decoded = std::move(kernel);
  }
  return *entry.decoded;
}

std::vector<std::string> Program::kernel_names() const {
  std::vector<std::string> names;
  for (const auto& [name, entry] : entries_) names.push_back(name);
  return names;
}

}  // namespace vgpu
