// Plain kernels of the two operators of a decoder that ExecuTorch's wheel has inside its torch library alone.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;

namespace edgekd {

// Write value (B, S, H, D) into cache (B, L, H, D) from position `start` on.
Tensor &update_cache_out(KernelRuntimeContext &, const Tensor &value, Tensor &cache, const int64_t start, Tensor &out) {
    const size_t row = value.size(2) * value.size(3) * value.element_size(), count = value.size(1), length = cache.size(1);
    auto *to = static_cast<char *>(cache.mutable_data_ptr());
    const auto *from = static_cast<const char *>(value.const_data_ptr());
    for (ssize_t b = 0; b < value.size(0); b++) {
        std::memcpy(to + (b * length + start) * row, from + b * count * row, count * row);
    }
    return out;
}

// Attention of queries (B, S, H, D) over the cached keys and values (B, L, G, D), G dividing H.
Tensor &custom_sdpa_out(KernelRuntimeContext &context, const Tensor &query, const Tensor &key, const Tensor &value,
                        const int64_t start, const std::optional<Tensor> &mask, const double, const bool causal,
                        const std::optional<double> scale, Tensor &out) {
    if (executorch::runtime::resize_tensor(out, query.sizes()) != executorch::runtime::Error::Ok) {
        context.fail(executorch::runtime::Error::InvalidArgument);
        return out;
    }
    const ssize_t count = query.size(1), heads = query.size(2), width = query.size(3), length = key.size(1);
    const ssize_t groups = key.size(2), masked = mask ? mask->size(mask->dim() - 1) : 0;
    const float factor = scale ? *scale : 1 / std::sqrt(static_cast<double>(width));
    const float *added = mask ? mask->const_data_ptr<float>() : nullptr;
    std::vector<float> weights(length);
    for (ssize_t row = 0; row < query.size(0) * count * heads; row++) {
        const ssize_t h = row % heads, s = row / heads % count, b = row / heads / count;
        const ssize_t seen = causal ? start + s + 1 : start + count;
        const ssize_t first = (b * length * groups + h / (heads / groups)) * width, step = groups * width;
        const float *q = query.const_data_ptr<float>() + row * width;
        const float *k = key.const_data_ptr<float>() + first, *v = value.const_data_ptr<float>() + first;
        float *o = out.mutable_data_ptr<float>() + row * width, sum = 0;
        for (ssize_t t = 0; t < seen; t++) {
            float product = 0;
            for (ssize_t d = 0; d < width; d++) product += q[d] * k[t * step + d];
            weights[t] = product * factor + (added ? added[s * masked + t] : 0);
        }
        const float most = *std::max_element(weights.begin(), weights.begin() + seen);
        for (ssize_t t = 0; t < seen; t++) sum += weights[t] = std::exp(weights[t] - most);
        std::fill(o, o + width, 0.0f);
        for (ssize_t t = 0; t < seen; t++) {
            for (ssize_t d = 0; d < width; d++) o[d] += weights[t] / sum * v[t * step + d];
        }
    }
    return out;
}

}  // namespace edgekd

EXECUTORCH_LIBRARY(llama, "update_cache.out", edgekd::update_cache_out);
EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", edgekd::custom_sdpa_out);
