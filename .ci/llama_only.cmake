# Read by llama-cpp-python's build right after its project(). Its CMakeLists forces the cache variable of this name on;
# a normal variable hides it. Python loads libllama and libggml alone;
# the common library would be 57 of the 140 build steps.
set(LLAMA_BUILD_COMMON OFF)
