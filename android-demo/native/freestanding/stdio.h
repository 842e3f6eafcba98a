// What ggml.h names of libc: native/edgekd_jni.c calls none of it.
typedef struct FILE FILE;
