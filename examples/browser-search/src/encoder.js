// Text to vectors: WordPiece tokens, the ONNX model, and the mean over the tokens.

import { Tokenizer } from "@huggingface/tokenizers";

export class Encoder {
  /**
   * @param {object} ort onnxruntime-web
   * @param {object} session the model: ids, mask and types in, `last_hidden_state` out
   * @param {object} tokenizer the content of tokenizer.json
   * @param {number} mostTokens positions that the model reads; what is longer is cut off
   */
  constructor(ort, session, tokenizer, mostTokens) {
    this.ort = ort;
    this.session = session;
    this.tokenizer = new Tokenizer(tokenizer, {});
    this.mostTokens = mostTokens;
    this.first = this.tokenizer.token_to_id("[CLS]");
    this.last = this.tokenizer.token_to_id("[SEP]");
  }

  /**
   * The unit vector of a text. Texts go one by one: without padding a batch saves no time on one thread, and the 8-bit
   * numbers of a text, whose scale is that of all that runs with it, would depend on its neighbours.
   * @returns {Promise<Float32Array>}
   */
  async encode(text) {
    const { ids } = this.tokenizer.encode(text, { add_special_tokens: false });
    const read = [this.first, ...ids.slice(0, this.mostTokens - 2), this.last];
    const integers = (values) => new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, read.length]);
    const { last_hidden_state: states } = await this.session.run({
      input_ids: integers(read),
      attention_mask: integers(read.map(() => 1)),
      token_type_ids: integers(read.map(() => 0)),
    });
    return unitMean(states.data, states.dims[2]);
  }
}

/** The mean of the rows of a matrix, with length 1. */
function unitMean(values, width) {
  const sum = new Float32Array(width);
  for (let place = 0; place < values.length; place++) sum[place % width] += values[place];
  const length = Math.hypot(...sum);
  return sum.map((value) => value / length);
}
