/** What a user can mend: what is wrong in one sentence, what to do in another, and a code for programs. */
export class Refusal extends Error {
  constructor(code, cause, remedy = "") {
    super(remedy ? `${cause} ${remedy}` : cause);
    this.name = "Refusal";
    this.code = code;
  }
}
