// A GGUF in llama.cpp; see windows.h.
#include "windows.h"
#include <llama.h>

static void errors(enum ggml_log_level level, const char *text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

int main(int count, char **arguments) {
    if (count != 6) return 2;
    llama_log_set(errors, nullptr);
    llama_backend_init();
    llama_model *model = llama_model_load_from_file(arguments[1], llama_model_default_params());
    if (!model) return 3;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = std::atoi(arguments[3]);
    params.n_threads = params.n_threads_batch = 1;
    llama_context *context = llama_init_from_model(model, params);
    if (!context) return 3;
    const size_t size = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::fputs(llama_print_system_info(), stdout);
    return write_logits(
        arguments, [&] { llama_memory_clear(llama_get_memory(context), true); },
        [&](const int32_t *ids, size_t n, size_t) -> Logits {
            if (llama_decode(context, llama_batch_get_one(const_cast<llama_token *>(ids), n))) std::exit(4);
            return {llama_get_logits_ith(context, -1), size};
        });
}
