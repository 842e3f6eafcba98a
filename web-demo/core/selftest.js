/** Whether this device computes what the artifact's own runtime computed where it was verified. */

/**
 * Run the manifest's golden answers again: greedy tokens of ids, which end before the first near tie.
 *
 * Returns `{answers, tokens, failure}`; a failure is a sentence, and `answers` 0 says that nothing was recorded.
 */
export async function selfTest(engine, manifest) {
  const golden = manifest.parity?.golden ?? [];
  let tokens = 0;
  for (const [number, answer] of golden.entries()) {
    const given = await engine.greedy(answer.prompt_ids, answer.tokens.length);
    const at = answer.tokens.findIndex((token, i) => token !== given[i]);
    if (at >= 0) {
      const failure = `Golden answer ${number + 1}: token ${at + 1} is ${given[at] ?? "missing"}, not ${answer.tokens[at]}.`;
      return { answers: golden.length, tokens: tokens + at, failure };
    }
    tokens += answer.tokens.length;
  }
  return { answers: golden.length, tokens, failure: null };
}
