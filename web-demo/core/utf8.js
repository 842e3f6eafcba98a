/** Text of a stream of tokens, which holds back bytes until their UTF-8 character is whole. */
export class Utf8Stream {
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });

  push(bytes) {
    return this.#decoder.decode(bytes, { stream: true });
  }

  end() {
    return this.#decoder.decode();
  }
}
