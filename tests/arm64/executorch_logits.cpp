// An ExecuTorch program in its C++ runtime; see windows.h. Its cache is written over.
#include "windows.h"
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::runtime::EValue;

int main(int count, char **arguments) {
    if (count != 6) return 2;
    executorch::extension::Module module(arguments[1]);
    std::vector<EValue> outputs;
    return write_logits(
        arguments, [] {},
        [&](const int32_t *ids, size_t n, size_t at) -> Logits {
            std::vector<int64_t> tokens(ids, ids + n);
            int64_t position = at;
            auto given = from_blob(tokens.data(), {1, static_cast<int>(n)}, ScalarType::Long);
            auto behind = from_blob(&position, {1}, ScalarType::Long);
            auto result = module.execute("forward", {EValue(*given), EValue(*behind)});
            if (!result.ok()) {
                std::fprintf(stderr, "forward fails: error %d\n", static_cast<int>(result.error()));
                std::exit(4);
            }
            outputs = std::move(*result);
            const auto logits = outputs[0].toTensor();
            const size_t size = logits.size(logits.dim() - 1);
            return {logits.const_data_ptr<float>() + logits.numel() - size, size};
        });
}
