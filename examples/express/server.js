import compression from "compression";
import express from "express";

const app = express();
app.use(compression());
app.use(express.json());

const connected = { events: new Set(), notifications: new Set(), broadcast: new Set() };

function openStream(req, res, clients) {
  res.setHeader("Content-Type", "text/event-stream");
  res.setHeader("Cache-Control", "no-cache");
  res.setHeader("Connection", "keep-alive");
  res.flushHeaders();
  clients.add(res);
  req.on("close", () => clients.delete(res));
}

const now = () => Date.now() / 1000;

// A numbered event each second, on from the one that the client had last.
app.get("/events", (req, res) => {
  openStream(req, res, connected.events);
  let n = Number(req.get("Last-Event-ID") ?? 0);
  const send = () => {
    n += 1;
    res.write(`id: ${n}\ndata: ${JSON.stringify({ n, time: now() })}\n\n`);
  };
  send();
  const timer = setInterval(send, 1000);
  req.on("close", () => clearInterval(timer));
});

// Named events: the unread notifications, then a reminder every half minute.
app.get("/notifications", (req, res) => {
  openStream(req, res, connected.notifications);
  const send = (kind, text) => {
    res.write(`event: ${kind}\ndata: ${JSON.stringify({ text, time: now() })}\n\n`);
  };
  for (const kind of ["info", "warning", "alert"]) {
    send(kind, `an unread ${kind}`);
  }
  const timer = setInterval(() => send("reminder", "three are unread"), 30_000);
  req.on("close", () => clearInterval(timer));
});

// What anybody posts to /publish.
app.get("/broadcast", (req, res) => {
  openStream(req, res, connected.broadcast);
});

app.post("/publish", (req, res) => {
  const message = JSON.stringify({ text: req.body.text, time: now() });
  for (const client of connected.broadcast) {
    client.write(`event: broadcast\ndata: ${message}\n\n`);
  }
  res.json({ sent: connected.broadcast.size });
});

app.get("/clients", (req, res) => {
  res.json(Object.fromEntries(Object.entries(connected).map(([path, clients]) => [path, clients.size])));
});

app.listen(process.env.PORT ?? 8000, "127.0.0.1");
