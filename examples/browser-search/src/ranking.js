// Finds the passages nearest to a query, and in each the sentence nearest to it.

/** Beyond the first three, passages that are less near than this share of the best are noise and left out. */
const NEAR = 0.5;

/** The cosine of two unit vectors. */
export function dot(one, other) {
  let sum = 0;
  for (let place = 0; place < one.length; place++) sum += one[place] * other[place];
  return sum;
}

/**
 * @param {Float32Array} query a unit vector
 * @param {{vector: Float32Array, sentences: Float32Array[]|null}[]} rows the index, a row a passage; the vectors of its
 *   sentences come later
 * @param {number} most give back no more passages than this
 * @returns {{hits: {passage: number, score: number, sentence: number|null}[], scores: Float32Array}} the best first; the
 *   scores of all rows in the order of the document
 */
export function rank(query, rows, most) {
  const scores = Float32Array.from(rows, (row) => dot(query, row.vector));
  const order = Array.from(scores.keys()).sort((one, other) => scores[other] - scores[one] || one - other);
  const near = order.slice(0, most).filter((passage, place) => place < 3 || scores[passage] >= NEAR * scores[order[0]]);
  const hits = near.map((passage) => {
    const likeness = rows[passage].sentences?.map((sentence) => dot(query, sentence));
    return { passage, score: scores[passage], sentence: likeness ? likeness.indexOf(Math.max(...likeness)) : null };
  });
  return { hits, scores };
}
