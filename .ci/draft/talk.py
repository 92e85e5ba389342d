"""talk.py: hear your agent without an account: you speak or type, and it speaks."""

import secrets
from dataclasses import replace

from aiohttp import web

from agent import RUNNER_OPTIONS, Agent, sign

PAGE = r"""<!doctype html><html lang="en-US"><meta charset="utf-8"><title>Talk</title>
<meta name="viewport" content="width=device-width"><style>
  html { color-scheme: light dark; font: 17px/1.5 system-ui; padding: 0 .5rem }
  body { max-width: 34em; height: 95vh; margin: auto; display: flex; flex-flow: column }
  main { flex: 1; display: flex; flex-flow: column-reverse; gap: .5rem; overflow: auto }
  form { display: grid; grid: auto / 1fr auto; gap: .5rem; padding: .5rem 0 }
  div { max-width: 80%; overflow-wrap: anywhere; white-space: pre-wrap }
  .agent, .caller, input, button { padding: .5rem 1rem; border-radius: 1.3rem }
  .agent { align-self: start; background: light-dark(#eceef2, #2b2e34) }
  .caller, button { align-self: end; background: #2f5fde; color: white }
  input, button { min-width: 0; border: thin solid gray; font: inherit }
</style><main role="log"></main>
<form><input required placeholder="Type here"><button type="button">Call</button></form>
<script>
const [log, form, box, button] = document.querySelectorAll("main, form, input, button");
const Ears = window.SpeechRecognition || window.webkitSpeechRecognition;
const ears = Ears ? new Ears() : { start() {}, abort() {} };
const call = crypto.randomUUID();
let answer = { isOver: true };
speechSynthesis.getVoices(); // The browser loads them when they are first asked for.
function write(className, textContent = "") {
  log.prepend(Object.assign(document.createElement("div"), { className, textContent }));
  return log.firstChild;
}
async function ask(more) {
  const ids = { conversation_id: call, session_id: call, turn_id: crypto.randomUUID() };
  const body = JSON.stringify({ ...more, ...ids, interruption_context: answer.report });
  const mine = new XMLHttpRequest();
  answer = Object.assign(mine, { heard: 0, line: write("agent"), data: write("data") });
  const signed = await fetch("/", { method: "POST", body }).catch(() => new Response());
  mine.open("POST", "/voice/agent");
  mine.setRequestHeader("layercode-signature", await signed.text());
  mine.onprogress = mine.onloadend = () => proceed(mine);
  mine.send(body);
}
function proceed(mine) { // Shows what has come, and has its next sentence spoken.
  if (mine.isOver) return;
  const isWhole = mine.readyState === XMLHttpRequest.DONE;
  const texts = mine.responseText.split("\n\n").slice(0, -1);
  const frames = texts.map((text) => JSON.parse(text.slice("data: ".length)));
  const all = (type) => frames.filter((it) => it.type === type).map((it) => it.content);
  const failure = isWhole && mine.status !== 200 && (mine.responseText || "No answer.");
  mine.line.textContent = failure || all("response.tts").join("");
  mine.data.innerText = all("response.data").map((it) => JSON.stringify(it)).join("\n");
  const rest = mine.line.textContent.slice(mine.heard);
  const [text] = rest.match(/^[^]*?[.!?…]["'”’)]*\s/) ?? [isWhole ? rest : ""];
  if (mine.sentence) return;
  if (text) return speak(mine, text);
  if (!isWhole) return;
  mine.isOver = true;
  ears.abort(); // What they have heard may be the agent's own words.
  if (all("response.hangup").length) form.replaceWith("The agent has hung up.");
}
function speak(mine, text) {
  const from = mine.heard;
  mine.sentence = new SpeechSynthesisUtterance(text);
  mine.sentence.onboundary = (at) => (mine.heard = from + at.charIndex);
  mine.sentence.onend = mine.sentence.onerror = () => {
    mine.heard = from + text.length;
    mine.sentence = null;
    proceed(mine);
  };
  if (speechSynthesis.getVoices().length) speechSynthesis.speak(mine.sentence);
  else mine.sentence.onend();
}
function interrupt() {
  if (answer.isOver) return;
  const text_heard = answer.line.textContent.slice(0, answer.heard).trim();
  answer.line.textContent = `${text_heard} —`;
  answer.report = { previous_turn_interrupted: true, text_heard };
  answer.isOver = true;
  answer.abort();
  speechSynthesis.cancel();
}
form.onsubmit = (event) => {
  event.preventDefault();
  interrupt();
  write("caller", box.value);
  ask({ type: "message", text: box.value });
  form.reset();
};
window.onpagehide = box.oninput = interrupt;
button.onclick = () => {
  button.textContent = "Hang up";
  button.onclick = () => location.reload();
  ask({ type: "session.start" });
  ears.start();
};
const plain = (text) => ` ${text} `.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, " ");
Object.assign(ears, { lang: document.documentElement.lang, interimResults: true });
ears.onresult = ({ results }) => {
  const words = Array.from(results, (it) => it[0].transcript).join(" ");
  const isEcho = plain(answer.line.textContent).includes(plain(words));
  if (isEcho && !answer.isOver) return;
  interrupt();
  box.value = words;
  if (results[results.length - 1].isFinal) form.requestSubmit();
};
ears.onend = () => setTimeout(() => form.isConnected && ears.start(), 200);
ears.onerror = ({ error }) => {
  if (error === "no-speech" || error === "aborted") return;
  ears.onend = null;
  write("data", `The browser cannot hear you (${error}), but you can type.`);
};
</script>"""


def talk(kind: type[Agent] = Agent) -> None:
    """Serves a page that plays Layercode with the browser's own ears and voice."""
    agent = kind()
    secret = secrets.token_hex()
    agent.settings = replace(agent.settings, layercode_webhook_secret=secret)

    async def page(request: web.Request) -> web.Response:
        # Another site's page has another Origin or, with a rebound name, another Host.
        own = f"http://{request.host}"
        is_here = request.host.partition(":")[0] in ("127.0.0.1", "localhost")
        if not is_here or request.headers.get("Origin", own) != own:
            raise web.HTTPForbidden(text="Only this machine's own page may talk here.")
        if request.method == "POST":
            return web.Response(text=sign(await request.read(), secret))
        return web.Response(text=PAGE, content_type="text/html")

    app = web.Application()
    app.router.add_route("*", "/", page)
    app.add_subapp("/voice", agent.make_app())
    web.run_app(app, host="127.0.0.1", port=agent.settings.port, **RUNNER_OPTIONS)


if __name__ == "__main__":
    talk()
