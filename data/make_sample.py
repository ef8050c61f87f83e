"""Write the sample data: short made-up consultations in the schema of the medical set, and agents that call tools.

    python data/make_sample.py

Every word is generated here from small tables, with a fixed seed; the same bytes come out each time. Row k+1 of
a dialogue is row k's prompt and response plus one user turn, as in MTMedDialog. Train and validation share no
dialogue.
"""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = Path(__file__).parent
SYSTEM = (
    "You are a doctor in a written consultation. Each turn, either ask one question or give a diagnosis with a "
    "recommendation.\nAnswer as <think> reasoning </think> <answer> Question: … </answer> or "
    "<answer> Diagnosis: … Recommendation: … </answer>."
)
CASES = {
    "a common cold": ("a runny nose and sneezing", "rest, fluids and a saline spray", "do you have a fever"),
    "tension headache": ("a dull headache on both sides", "regular breaks and paracetamol", "does light bother you"),
    "gastroenteritis": (
        "vomiting and watery stool",
        "oral rehydration and light food",
        "did others who ate with you fall ill",
    ),
    "hay fever": ("itchy eyes each spring", "an antihistamine in the morning", "is it worse outdoors"),
    "a sprained ankle": ("a swollen ankle after a fall", "rest, ice and a bandage", "can you put weight on it"),
    "reflux": ("burning behind the breastbone after meals", "smaller meals and an antacid", "is it worse lying down"),
    "low back strain": ("back pain since lifting boxes", "gentle movement and warmth", "does the pain run down a leg"),
    "conjunctivitis": ("a red, sticky eye", "warm compresses and clean hands", "is your sight blurred"),
}
QUESTIONS = {
    "how long has this been going on": "to know how long it has lasted",
    "how strong is it from one to ten": "to know how severe it is",
    "do you take any medicine": "to know what is taken already",
    "did you have this before": "to know whether it comes back",
}
REPLIES = {
    "how long has this been going on": ["Since yesterday.", "For about three days.", "It started a week ago."],
    "how strong is it from one to ten": ["About a four.", "A six, I think.", "Three, but it does not stop."],
    "do you take any medicine": ["No, nothing.", "Only vitamins.", "Something for my blood pressure."],
    "did you have this before": ["Never.", "Yes, last year.", "Once, as a child."],
}


def dialogue(rng: random.Random, index: int, split: str) -> list[dict]:
    """The rows of one dialogue, one for each doctor's turn."""
    disease, (symptom, advice, special) = rng.choice(list(CASES.items()))
    asked = rng.sample(list(QUESTIONS), k=rng.randint(1, 3))
    questions = [(q, QUESTIONS[q], rng.choice(REPLIES[q])) for q in asked]
    questions.append((special, f"to tell {disease} from something else", rng.choice(["No.", "Yes, a little.", "Yes."])))
    opening = f"I am {rng.randint(18, 80)} and I have {symptom}."
    history = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": opening}]
    rows = []
    for question, reason, reply in questions:
        answer = f"<think> {symptom.capitalize()}. I ask {reason}. </think>\n"
        answer += f"<answer> Question: {question.capitalize()}? </answer>"
        rows.append((list(history), answer))
        history += [{"role": "assistant", "content": answer}, {"role": "user", "content": reply}]
    verdict = f"<think> This fits {disease}. </think>\n"
    verdict += f"<answer> Diagnosis: {disease}. Recommendation: {advice}. </answer>"
    rows.append((list(history), verdict))
    truth = {"ground_truth": {"diagnosis": disease, "recommendation": advice}}
    return [
        {
            "data_source": "dsft_sample",
            "prompt": prompt,
            "response": response,
            "reward_model": truth,
            "extra_info": {"split": split, "index": index, "turn": turn},
        }
        for turn, (prompt, response) in enumerate(rows)
    ]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name of the city"}},
                "required": ["city"],
            },
        },
    }
    for name, description in (("weather", "Current weather of a city"), ("local_time", "Local time in a city"))
]
CITIES = ["Rome", "Oslo", "Lima", "Cairo", "Kyoto", "Quito", "Porto", "Tunis"]
SKIES = ["sunny", "cloudy", "rainy", "foggy"]


def agent(rng: random.Random) -> dict:
    """A conversation of one to four questions, each answered by a tool call and its result."""
    messages: list[dict] = [{"role": "system", "content": "Answer with the tools. Be brief."}]
    for turn in range(rng.randint(1, 4)):
        city, sky, degrees, hour = rng.choice(CITIES), rng.choice(SKIES), rng.randint(-5, 35), rng.randint(0, 23)
        name = rng.choice(["weather", "local_time"])
        asked = f"What is the weather in {city}?" if name == "weather" else f"What time is it in {city}?"
        result = {"sky": sky, "degrees": degrees} if name == "weather" else {"hour": hour}
        answer = f"It is {sky} in {city}, {degrees} degrees." if name == "weather" else f"It is {hour}:00 in {city}."
        call = {"type": "function", "id": f"call{turn}", "function": {"name": name, "arguments": {"city": city}}}
        messages += [
            {"role": "user", "content": asked},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": f"The user asks about {city}, so I call {name}.",
                "tool_calls": [call],
            },
            {"role": "tool", "tool_call_id": f"call{turn}", "name": name, "content": json.dumps(result)},
            {"role": "assistant", "content": answer, "reasoning_content": f"The tool has answered for {city}."},
        ]
    return {"messages": messages, "tools": TOOLS}


def main() -> None:
    """Write sample_train.parquet, sample_val.parquet and sample_agents.jsonl."""
    rng = random.Random(7)
    seen: set[str] = set()
    for split, dialogues in (("train", 24), ("val", 6)):
        rows: list[dict] = []
        index = 0
        while index < dialogues:
            new = dialogue(rng, index, split)
            whole = str([row["prompt"][1:] for row in new])
            if whole not in seen:
                seen.add(whole)
                rows += new
                index += 1
        pq.write_table(pa.Table.from_pylist(rows), FOLDER / f"sample_{split}.parquet", compression="zstd")
        print(f"sample_{split}.parquet: {dialogues} dialogues, {len(rows)} rows")
    rng = random.Random(7)
    agents = [json.dumps(agent(rng)) for _ in range(16)]
    (FOLDER / "sample_agents.jsonl").write_text("\n".join(agents) + "\n", encoding="utf-8")
    print(f"sample_agents.jsonl: {len(agents)} conversations")


if __name__ == "__main__":
    main()
