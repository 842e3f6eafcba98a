package io.edgekd.demo

/** What a user can mend: what is wrong in one sentence, what to do in another, and a code for programs. */
class Refusal(val code: String, words: String, remedy: String = "") :
    Exception(if (remedy.isEmpty()) words else "$words $remedy")
