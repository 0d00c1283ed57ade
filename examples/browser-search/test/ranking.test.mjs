import assert from "node:assert/strict";
import { test } from "node:test";
import { rank } from "../src/ranking.js";

const at = (degrees) => Float32Array.of(Math.cos((degrees * Math.PI) / 180), Math.sin((degrees * Math.PI) / 180));
const row = (degrees, sentences = null) => ({ vector: at(degrees), sentences: sentences?.map(at) ?? null });

test("the nearest passages come first, with the nearest sentence of those whose sentences were read", () => {
  const { hits, scores } = rank(at(0), [row(50), row(10, [80, 5, 40]), row(30)], 2);
  assert.deepEqual(hits.map(({ passage, sentence }) => [passage, sentence]), [[1, 1], [2, null]]);
  assert.ok(Math.abs(hits[0].score - Math.cos(Math.PI / 18)) < 1e-6);
  assert.equal(scores.length, 3);
});

test("beyond three, passages that are much less near than the best are left out", () => {
  const rows = [row(0), row(85), row(86), row(87), row(20), row(88)];
  assert.deepEqual(rank(at(0), rows, 6).hits.map((hit) => hit.passage), [0, 4, 1]);
});

test("nothing is found in an empty index", () => {
  assert.deepEqual(rank(at(0), [], 8).hits, []);
});
