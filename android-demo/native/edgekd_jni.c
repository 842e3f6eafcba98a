// llama.cpp's C API for io.edgekd.demo.Llama. Nothing of libc is used, so that this source links with bionic's
// library without an NDK, and with a desktop's libllama, through which the tests drive it.
#include <jni.h>
#include <llama.h>

#define NATIVE(name) Java_io_edgekd_demo_Llama_##name
#define MODELS 4

typedef struct {
    struct llama_model *model;
    struct llama_context *context;
    const struct llama_vocab *vocab;
} Handle;

static Handle handles[MODELS];

static void quiet(enum ggml_log_level level, const char *text, void *user) { (void)level; (void)text; (void)user; }

static Handle *of(jlong handle) { return (Handle *)(uintptr_t)handle; }

// The handle of a model and its context; 0: it could not be loaded, or there is no memory for the context.
JNIEXPORT jlong JNICALL NATIVE(open)(JNIEnv *env, jclass type, jbyteArray path, jint context, jint batch, jint threads) {
    (void)type;
    Handle *handle = 0;
    for (int i = 0; i < MODELS && !handle; i++) if (!handles[i].model) handle = &handles[i];
    if (!handle) return 0;
    llama_log_set(quiet, 0);
    llama_backend_init();
    jbyte *name = (*env)->GetByteArrayElements(env, path, 0);
    struct llama_model_params model = llama_model_default_params();
    model.n_gpu_layers = 0;
    handle->model = llama_model_load_from_file((const char *)name, model);
    (*env)->ReleaseByteArrayElements(env, path, name, JNI_ABORT);
    if (!handle->model) return 0;
    struct llama_context_params settings = llama_context_default_params();
    settings.n_ctx = (uint32_t)context;
    settings.n_batch = settings.n_ubatch = (uint32_t)batch;
    settings.n_threads = settings.n_threads_batch = threads;
    settings.no_perf = true;
    handle->context = llama_init_from_model(handle->model, settings);
    if (!handle->context) {
        llama_model_free(handle->model);
        handle->model = 0;
        return 0;
    }
    handle->vocab = llama_model_get_vocab(handle->model);
    return (jlong)(uintptr_t)handle;
}

JNIEXPORT jint JNICALL NATIVE(vocabSize)(JNIEnv *env, jclass type, jlong handle) {
    (void)env; (void)type;
    return llama_vocab_n_tokens(of(handle)->vocab);
}

// Ids of UTF-8, in which nothing is a special token and to which nothing is added.
JNIEXPORT jintArray JNICALL NATIVE(tokenize)(JNIEnv *env, jclass type, jlong handle, jbyteArray text) {
    (void)type;
    jsize size = (*env)->GetArrayLength(env, text), room = size + 8;
    jintArray ids = (*env)->NewIntArray(env, room);
    if (!ids) return 0;
    jbyte *bytes = (*env)->GetByteArrayElements(env, text, 0);
    jint *found = (*env)->GetIntArrayElements(env, ids, 0);
    jint count = llama_tokenize(of(handle)->vocab, (const char *)bytes, size, (llama_token *)found, room, false, false);
    jintArray whole = (*env)->NewIntArray(env, count > 0 ? count : 0);
    if (whole && count > 0) (*env)->SetIntArrayRegion(env, whole, 0, count, found);
    (*env)->ReleaseByteArrayElements(env, text, bytes, JNI_ABORT);
    (*env)->ReleaseIntArrayElements(env, ids, found, JNI_ABORT);
    return whole;
}

// The bytes of a token, a special one's too where asked for; null: more than there is room for here.
JNIEXPORT jbyteArray JNICALL NATIVE(piece)(JNIEnv *env, jclass type, jlong handle, jint token, jboolean special) {
    (void)type;
    char bytes[1024];
    jint count = llama_token_to_piece(of(handle)->vocab, token, bytes, sizeof bytes, 0, special);
    if (count < 0) return 0;
    jbyteArray piece = (*env)->NewByteArray(env, count);
    if (piece) (*env)->SetByteArrayRegion(env, piece, 0, count, (const jbyte *)bytes);
    return piece;
}

JNIEXPORT void JNICALL NATIVE(reset)(JNIEnv *env, jclass type, jlong handle) {
    (void)env; (void)type;
    llama_memory_clear(llama_get_memory(of(handle)->context), false);
}

// Write ids behind those that are cached; 0, or llama.cpp's status.
JNIEXPORT jint JNICALL NATIVE(feed)(JNIEnv *env, jclass type, jlong handle, jintArray ids) {
    (void)type;
    jint *tokens = (*env)->GetIntArrayElements(env, ids, 0);
    jint status = llama_decode(of(handle)->context, llama_batch_get_one((llama_token *)tokens, (*env)->GetArrayLength(env, ids)));
    (*env)->ReleaseIntArrayElements(env, ids, tokens, JNI_ABORT);
    return status;
}

// The most likely next id.
JNIEXPORT jint JNICALL NATIVE(best)(JNIEnv *env, jclass type, jlong handle) {
    (void)env; (void)type;
    const float *logits = llama_get_logits_ith(of(handle)->context, -1);
    jint best = 0, size = llama_vocab_n_tokens(of(handle)->vocab);
    for (jint i = 1; i < size; i++) if (logits[i] > logits[best]) best = i;
    return best;
}

JNIEXPORT void JNICALL NATIVE(close)(JNIEnv *env, jclass type, jlong handle) {
    (void)env; (void)type;
    llama_free(of(handle)->context);
    llama_model_free(of(handle)->model);
    *of(handle) = (Handle){0};
}
