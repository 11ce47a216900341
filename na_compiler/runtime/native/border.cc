// What windows do at the ends of axes, as na_compiler.borders has it: checks, and the form in which equal rules are equal.
#include <algorithm>
#include <cstdlib>

#include "error.h"
#include "kernel.h"

namespace na {
namespace {

constexpr char kShift[] = "shift", kCut[] = "cut", kWrap[] = "wrap", kClamp[] = "clamp";

// Whether it is cut:LEFT, as Python writes the number.
bool has_left(const std::string& word) {
  if (word.rfind("cut:", 0) != 0 || word.size() < 5 || word.size() > 22) return false;
  bool digits = std::all_of(word.begin() + 4, word.end(), [](char letter) { return letter >= '0' && letter <= '9'; });
  return digits && (word[4] != '0' || word.size() == 5);
}

int64_t before(int64_t kernel, const std::string& word) {
  return has_left(word) ? std::strtoll(word.c_str() + 4, nullptr, 10) : kernel / 2;
}

std::vector<std::string> borders_of(const std::string& words, size_t rank) {
  std::vector<std::string> parts(1);
  for (char letter : words) {
    if (letter == ',') {
      parts.emplace_back();
    } else {
      parts.back() += letter;
    }
  }
  if (parts.size() == 1) parts.assign(rank, parts[0]);
  bool is_known = parts.size() == rank;
  for (const std::string& word : parts) {
    is_known = is_known && (word == kShift || word == kCut || word == kWrap || word == kClamp || has_left(word));
  }
  if (!is_known) {
    throw Error({"border must be shift, cut, cut:LEFT, wrap or clamp, or one of these for each of the ", rank,
                 " axes with commas between them, got ", words});
  }
  return parts;
}

}  // namespace

void Problem::take_border(const std::string& words) {
  border = borders_of(words, layout.size());
  for (size_t axis = 0; axis < border.size(); ++axis) {
    // What is less than 1, and an axis shorter than its dilation, is refused below.
    if (border[axis] != kClamp) continue;
    border[axis] = kShift;
    if (dilation[axis] < 1 || dilation[axis] > layout[axis]) continue;
    kernel_size[axis] = std::min(kernel_size[axis], layout[axis] / dilation[axis]);
    stride[axis] = std::min(stride[axis], kernel_size[axis]);
  }
  check();
  bool has_bias = has("relative_position_bias");
  for (size_t axis = 0; axis < border.size(); ++axis) {
    int64_t tokens = layout[axis], gap = dilation[axis], kernel = kernel_size[axis], step = stride[axis];
    std::string& word = border[axis];
    if (word == kShift) continue;
    if (word == kWrap) {
      if (kernel == 1 || (kernel == tokens / gap && !has_bias)) word = kShift;
      continue;
    }
    bool is_causal_now = is_causal[axis] != 0;
    if (!is_causal_now && kernel == 1) {
      word = kShift;
      continue;
    }
    if (!is_causal_now && step == 1 && before(kernel, word) == kernel - 1) {
      is_causal[axis] = 1;
      is_causal_now = true;
      word = kCut;
    }
    if (is_causal_now) {
      // Of the one or two lengths that dilation groups have.
      bool is_whole = (tokens / gap) % step == 0 && (tokens % gap == 0 || (tokens / gap + 1) % step == 0);
      if (kernel <= tokens / gap && is_whole) word = kShift;
    } else if (before(kernel, word) == kernel / 2) {
      word = kCut;
    }
  }
  if (std::all_of(border.begin(), border.end(), [](const std::string& word) { return word == kShift; })) border.clear();
}

void Problem::check_border(size_t axis) const {
  const std::string word = border.empty() ? kShift : border[axis], where = sentence({" on axis ", axis});
  int64_t tokens = layout[axis], gap = dilation[axis], kernel = kernel_size[axis], step = stride[axis];
  bool is_cut = word == kCut || has_left(word);
  if (!is_cut && kernel > tokens / gap) {
    // Without a product, which might overflow.
    throw Error({"kernel_size * dilation must be at most the layout's ", tokens, " tokens", where,
                 ", got kernel_size=", kernel, " and dilation=", gap});
  }
  if (gap > tokens) {
    throw Error({"dilation must be at most the layout's ", tokens, " tokens", where, ", got ", gap});
  }
  if (has_left(word) && (before(kernel, word) >= kernel || step != 1 || is_causal[axis] != 0)) {
    throw Error(
        {"border=", word, where, " must have LEFT less than kernel_size=", kernel, ", stride=1 and no causality"});
  }
  if (word == kWrap && (is_causal[axis] != 0 || tokens % gap != 0 || tokens / gap % step != 0)) {
    throw Error({"border=wrap", where, " must have no causality, a dilation that divides the layout's ", tokens,
                 " tokens, and a stride that divides a dilation group's; got dilation=", gap, " and stride=", step});
  }
}

}  // namespace na
