// Runs a GGUF file in llama.cpp: prints greedy token ids, and the speed of decoding, as one line of JSON.
//   node launch/llama_cpp.mjs --model=FILE.gguf [--prompt=TEXT | --ids=1,2,3] [--tokens=32] [--threads=2] [--context=N]
// Needs Node 20 and `npm install node-llama-cpp@3.21.1` (a prebuilt llama.cpp) in a directory outside the repository,
// which NODE_LLAMA_CPP names. Generation goes on behind tokens that end a text, so that all runs make equally many.
import {createRequire} from "node:module";
import path from "node:path";
import {pathToFileURL} from "node:url";

const DEFAULTS = {prompt: "Once upon a time", tokens: "32", threads: "2"};
const KNOWN = ["model", "prompt", "ids", "tokens", "threads", "context"];

function fail(message) {
  console.error(`llama_cpp.mjs: ${message}`);
  process.exit(2);
}

function options(words) {
  const found = {};
  for (const word of words) {
    const [, name, value] = /^--([a-z]+)=(.*)$/s.exec(word) ?? fail(`${word} is not --NAME=VALUE`);
    if (!KNOWN.includes(name)) fail(`--${name} is unknown; known: ${KNOWN.join(", ")}`);
    found[name] = value;
  }
  if (found.model === undefined) fail("give --model=FILE.gguf");
  return {...DEFAULTS, ...found};
}

function whole(given, name) {
  const number = Number(given[name]);
  if (!Number.isInteger(number) || number < 1) fail(`--${name}=${given[name]} must be a whole number above 0`);
  return number;
}

async function library() {
  const directory = process.env.NODE_LLAMA_CPP ?? fail("set NODE_LLAMA_CPP to the directory of `npm install`");
  try {
    const require = createRequire(path.join(path.resolve(directory), "package.json"));
    return await import(pathToFileURL(require.resolve("node-llama-cpp")).href);
  } catch (error) {
    return fail(`no node-llama-cpp in ${directory} (${error.message.split("\n")[0]}): npm install node-llama-cpp@3.21.1`);
  }
}

const given = options(process.argv.slice(2));
const [wanted, threads] = [whole(given, "tokens"), whole(given, "threads")];
const {getLlama, LlamaLogLevel} = await library();
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: threads});
const model = await llama.loadModel({modelPath: path.resolve(given.model)}).catch((error) => fail(error.message));
const prompt = given.ids === undefined ? model.tokenize(given.prompt) : given.ids.split(",").map(Number);
const contextSize = given.context === undefined ? prompt.length + wanted + 8 : whole(given, "context");
const context = await model.createContext({contextSize, threads, flashAttention: false});
const ids = [];
let start;
for await (const id of context.getSequence().evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
  start ??= performance.now(); // the prompt has been read, and the first token made
  ids.push(id);
  if (ids.length === wanted) break;
}
const seconds = (performance.now() - start) / 1000;
console.log(JSON.stringify({
  prompt, ids, text: model.detokenize(ids), threads, decode_tokens_per_second: (ids.length - 1) / seconds,
  llama_cpp: llama.llamaCppRelease.release,
}));
process.exit(0);
