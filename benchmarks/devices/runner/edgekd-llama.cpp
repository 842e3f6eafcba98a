// Times one GGUF in llama.cpp on the device it runs on; benchmarks/devices/llama.py reads what it says.
//
//     edgekd-llama --version
//     edgekd-llama --drop FILE                                      have the system forget the file's pages
//     edgekd-llama MODEL CONTEXT THREADS BATCH SPECIAL STEP...      SPECIAL: a file of the special tokens' ids
//
// The steps are taken in their order, and each says one line of JSON. PROMPT is a file.
//
//     phase:NAME                    memory since the phase before, and the next one begins
//     text:PROMPT:MOST              a request up to its first whole character, of at most so many silent tokens
//     serve:PROMPT:TOKENS           a request and so many tokens behind its first
//     idle:SECONDS
//     prefill:PROMPT:SECONDS        prompts again and again; the window and the tokens in it
//     decode:PROMPT:TOKENS:SECONDS  the same of tokens behind a prompt, whose own time is left out
//     request:PROMPT:TOKENS:SECONDS the same of whole requests
//     sustain:PROMPT:SECONDS:SLICES decoding without a pause
//
// Seconds are those of CLOCK_BOOTTIME, which /proc/uptime tells other programs. The words are those of
// benchmarks/definitions.py, and what happens in a request is what happens in its serve().

#include <fcntl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

static double now() {
    timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

[[noreturn]] static void fail(const std::string & words) {
    fprintf(stderr, "%s\n", words.c_str());
    exit(1);
}

static std::string read_file(const std::string & path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) fail("cannot read " + path);
    return {std::istreambuf_iterator<char>(file), {}};
}

// --- what the system says of this process ---------------------------------------------------------------------------

static long long number_in(const char * path, const char * key) {  // behind the key at the head of a line; -1: not told
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        if (line.rfind(key, 0) == 0) return atoll(line.c_str() + strlen(key));
    }
    return -1;
}

static long long kib(const char * path, const char * key) {
    const long long found = number_in(path, key);
    return found < 0 ? found : 1024 * found;
}

static void end_phase(const std::string & name) {
    const char * rollup = "/proc/self/smaps_rollup";
    printf("{\"phase\":\"%s\",\"peak_rss\":%lld,\"rss\":%lld,\"anonymous\":%lld,\"swap\":%lld,\"pss\":%lld}\n", name.c_str(),
           kib("/proc/self/status", "VmHWM:"), kib(rollup, "Rss:"), kib(rollup, "Anonymous:"), kib(rollup, "Swap:"),
           kib(rollup, "Pss:"));
    std::ofstream("/proc/self/clear_refs") << "5";  // the peak begins again
}

static double started() {  // this process, by its 22nd field, to a hundredth of a second
    const std::string stat = read_file("/proc/self/stat");
    std::istringstream fields(stat.substr(stat.rfind(')') + 1));
    std::vector<std::string> words{std::istream_iterator<std::string>(fields), {}};
    return atof(words.at(19).c_str()) / sysconf(_SC_CLK_TCK);
}

static void drop(const char * path) {
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) fail(std::string("cannot open ") + path);
    fsync(file);  // a dirty page is not dropped
    posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    close(file);
}

// --- llama.cpp ------------------------------------------------------------------------------------------------------

struct Engine {
    llama_model * model;
    llama_context * context;
    const llama_vocab * vocab;
    int batch;
    std::set<llama_token> special;

    Engine(const char * path, int n_ctx, int threads, int batch, const std::string & special_ids) : batch(batch) {
        model = llama_model_load_from_file(path, llama_model_default_params());
        if (!model) fail("llama.cpp does not load the model");
        llama_context_params params = llama_context_default_params();
        params.n_ctx = n_ctx;
        params.n_batch = params.n_ubatch = batch;
        params.n_threads = params.n_threads_batch = threads;
        params.no_perf = true;
        context = llama_init_from_model(model, params);
        if (!context) fail("llama.cpp makes no context of so many tokens: memory is short");
        vocab = llama_model_get_vocab(model);
        std::istringstream ids(special_ids);
        special = {std::istream_iterator<llama_token>(ids), {}};
    }

    std::vector<llama_token> tokenize(const std::string & text) const {
        std::vector<llama_token> ids(text.size() + 8);
        const int count = llama_tokenize(vocab, text.data(), text.size(), ids.data(), ids.size(), false, false);
        if (count < 0) fail("llama.cpp does not read the prompt");
        ids.resize(count);
        return ids;
    }

    std::string bytes(llama_token token) const {
        std::string piece(64, 0);
        int length;
        while ((length = llama_token_to_piece(vocab, token, &piece[0], piece.size(), 0, !special.count(token))) < 0) {
            piece.resize(-length);
        }
        piece.resize(length);
        return piece;
    }

    void reset() { llama_memory_clear(llama_get_memory(context), false); }

    const float * feed(llama_token * ids, int count) {
        for (int at = 0; at < count; at += batch) {
            if (llama_decode(context, llama_batch_get_one(ids + at, std::min(batch, count - at)))) {
                fail("llama.cpp failed to decode");
            }
        }
        return llama_get_logits_ith(context, -1);
    }

    llama_token likeliest(const float * logits) const {
        return std::max_element(logits, logits + llama_vocab_n_tokens(vocab)) - logits;
    }
};

// --- requests -------------------------------------------------------------------------------------------------------

struct Characters {
    std::string pending;

    bool feed(const std::string & bytes) {  // whether a character is whole now
        pending += bytes;
        size_t at = 0;
        while (at < pending.size()) {
            const unsigned char lead = pending[at];
            const size_t length = lead >= 0xF0 && lead < 0xF5 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC2 ? 2 : 1;
            size_t have = 1;
            while (have < length && at + have < pending.size() && (pending[at + have] & 0xC0) == 0x80) have++;
            if (have < length && at + have == pending.size()) break;  // its end may come
            at += have;                                               // whole, or nothing that ever becomes one
        }
        pending.erase(0, at);
        return at > 0;
    }
};

struct Request {
    double text_in, ids_ready, prefilled;
    size_t prompt_tokens;
    std::vector<double> decoded, chosen, chunks;
    std::vector<llama_token> tokens;

    double latency() const { return chosen.back() - text_in; }
};

static Request serve(Engine & engine, const std::string & text, size_t decode_tokens, bool until_text) {
    Request r;
    Characters characters;
    const auto choose = [&](const float * logits) {
        const llama_token token = engine.likeliest(logits);
        r.chosen.push_back(now());
        if (characters.feed(engine.bytes(token))) r.chunks.push_back(now());
        r.tokens.push_back(token);
        return token;
    };
    engine.reset();
    r.text_in = now();
    std::vector<llama_token> ids = engine.tokenize(text);
    r.ids_ready = now();
    r.prompt_tokens = ids.size();
    const float * logits = engine.feed(ids.data(), ids.size());
    r.prefilled = now();
    llama_token token = choose(logits);
    while (r.chosen.size() <= decode_tokens && !(until_text && !r.chunks.empty())) {
        logits = engine.feed(&token, 1);
        r.decoded.push_back(now());
        token = choose(logits);
    }
    return r;
}

template <typename T>
static std::string json(const std::vector<T> & values) {
    std::ostringstream out;
    out.precision(17);
    for (const T & value : values) out << (out.tellp() ? "," : "") << value;
    return "[" + out.str() + "]";
}

static void tell(const Request & r) {
    printf("{\"prompt_tokens\":%zu,\"text_in\":%.9f,\"ids_ready\":%.9f,\"prefilled\":%.9f,\"decoded\":%s,\"chosen\":%s,"
           "\"chunks\":%s,\"tokens\":%s}\n",
           r.prompt_tokens, r.text_in, r.ids_ready, r.prefilled, json(r.decoded).c_str(), json(r.chosen).c_str(),
           json(r.chunks).c_str(), json(r.tokens).c_str());
}

// --- windows --------------------------------------------------------------------------------------------------------

struct Window {
    std::vector<double> spans;  // begin, end, begin, end ...
    size_t tokens = 0;

    void tell() const { printf("{\"spans\":%s,\"tokens\":%zu}\n", json(spans).c_str(), tokens); }
};

static llama_token prompt(Engine & engine, std::vector<llama_token> & ids) {
    engine.reset();
    return engine.likeliest(engine.feed(ids.data(), ids.size()));
}

static llama_token decode(Engine & engine, llama_token token, size_t count) {
    while (count--) token = engine.likeliest(engine.feed(&token, 1));
    return token;
}

static Window prefill_window(Engine & engine, std::vector<llama_token> ids, double seconds) {
    Window w{{now()}};
    do {
        prompt(engine, ids);
        w.tokens += ids.size();
    } while (now() - w.spans[0] < seconds);
    w.spans.push_back(now());
    return w;
}

static Window decode_window(Engine & engine, std::vector<llama_token> ids, size_t count, double seconds) {
    Window w;
    for (double spent = 0; spent < seconds; spent += w.spans.back() - w.spans.end()[-2]) {
        const llama_token token = prompt(engine, ids);
        w.spans.push_back(now());
        decode(engine, token, count);
        w.spans.push_back(now());
        w.tokens += count;
    }
    return w;
}

static Window request_window(Engine & engine, std::vector<llama_token> ids, size_t count, double seconds) {
    Window w{{now()}};
    do {
        decode(engine, prompt(engine, ids), count);
        w.tokens++;
    } while (now() - w.spans[0] < seconds);
    w.spans.push_back(now());
    return w;
}

static void sustain(Engine & engine, std::vector<llama_token> ids, double seconds, int slices) {
    const size_t context = llama_n_ctx(engine.context);
    llama_token token = prompt(engine, ids);
    size_t used = ids.size();
    std::string told;
    for (int i = 0; i < slices; i++) {
        const double began = now();
        double busy = 0;
        size_t count = 0;
        while (now() - began < seconds / slices) {
            if (used == context) token = prompt(engine, ids), used = ids.size();
            const double start = now();
            token = engine.likeliest(engine.feed(&token, 1));
            busy += now() - start;
            count++, used++;
        }
        char slice[96];
        snprintf(slice, sizeof slice, "%s[%.6f,%.6f,%zu]", i ? "," : "", now() - began, busy, count);
        told += slice;
    }
    printf("{\"slices\":[%s]}\n", told.c_str());
}

// --- steps ----------------------------------------------------------------------------------------------------------

static void step(Engine & engine, const std::string & words) {
    std::vector<std::string> w;
    std::istringstream parts(words);
    for (std::string part; std::getline(parts, part, ':');) w.push_back(part);
    const auto is = [&](const char * name, size_t count) { return w.size() == count && w[0] == name; };
    const auto ids = [&] { return engine.tokenize(read_file(w[1])); };
    if (is("phase", 2)) {
        end_phase(w[1]);
    } else if (is("text", 3)) {
        tell(serve(engine, read_file(w[1]), stoul(w[2]), true));
    } else if (is("serve", 3)) {
        tell(serve(engine, read_file(w[1]), stoul(w[2]), false));
    } else if (is("idle", 2)) {
        Window w_idle{{now()}};
        usleep(1e6 * stod(w[1]));
        w_idle.spans.push_back(now());
        w_idle.tell();
    } else if (is("prefill", 3)) {
        prefill_window(engine, ids(), stod(w[2])).tell();
    } else if (is("decode", 4)) {
        decode_window(engine, ids(), stoul(w[2]), stod(w[3])).tell();
    } else if (is("request", 4)) {
        request_window(engine, ids(), stoul(w[2]), stod(w[3])).tell();
    } else if (is("sustain", 4)) {
        sustain(engine, ids(), stod(w[2]), stoi(w[3]));
    } else {
        fail("no such step: " + words);
    }
    fflush(stdout);
}

int main(int argc, char ** argv) {
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
    }, nullptr);
    if (argc == 2 && !strcmp(argv[1], "--version")) {
        ggml_backend_load_all();
        printf("llama.cpp %s, %s\n", llama_version(), llama_print_system_info());
        return 0;
    }
    if (argc == 3 && !strcmp(argv[1], "--drop")) {
        drop(argv[2]);
        return 0;
    }
    if (argc < 7) fail("usage: edgekd-llama MODEL CONTEXT THREADS BATCH SPECIAL STEP...");
    ggml_backend_load_all();
    llama_backend_init();
    const std::string special = read_file(argv[5]);
    const long long rss_before = kib("/proc/self/status", "VmRSS:");
    end_phase("start");
    const double load_began = now();
    Engine engine(argv[1], atoi(argv[2]), atoi(argv[3]), atoi(argv[4]), special);
    printf("{\"load_began\":%.9f,\"loaded\":%.9f,\"rss_before\":%lld}\n", load_began, now(), rss_before);
    for (int i = 6; i < argc; i++) step(engine, argv[i]);
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("{\"started\":%.9f,\"major_faults\":%ld,\"read_bytes\":%lld}\n", started(), usage.ru_majflt,
           number_in("/proc/self/io", "read_bytes:"));
    llama_free(engine.context);
    llama_model_free(engine.model);
    return 0;
}
