/** Whether this device computes what the artifact's own runtime computed where it was verified. */

import { chatIds, renderChat, textIds } from "./conversation.js";

/** What is wrong with the ids of an answer's text, in a sentence; null: nothing, or they are of none. */
function misread({ prompt_ids, text, messages }, contract, tokenizer) {
  if (text == null) return null;
  if (messages && renderChat(contract, messages) !== text) return "its chat is rendered as another text.";
  const ids = (messages ? chatIds : textIds)(tokenizer, contract, text);
  return String(ids) === String(prompt_ids) ? null : `its text is read as ${ids}, not ${prompt_ids}.`;
}

/**
 * Run the manifest's golden answers again: the ids of texts, and greedy tokens of ids, which end before the first near tie.
 *
 * Returns `{answers, tokens, failure}`; a failure is a sentence, and `answers` 0 says that nothing was recorded.
 */
export async function selfTest(engine, manifest, tokenizer) {
  const golden = manifest.parity?.golden ?? [];
  let tokens = 0;
  for (const [number, answer] of golden.entries()) {
    const wrong = misread(answer, manifest.contract, tokenizer);
    if (wrong) return { answers: golden.length, tokens, failure: `Golden answer ${number + 1}: ${wrong}` };
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
