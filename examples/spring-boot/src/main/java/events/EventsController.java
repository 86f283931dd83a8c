package events;

import java.io.IOException;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;

import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.PostMapping;
import org.springframework.web.bind.annotation.RequestBody;
import org.springframework.web.bind.annotation.RequestHeader;
import org.springframework.web.bind.annotation.RestController;
import org.springframework.web.servlet.mvc.method.annotation.SseEmitter;

@RestController
public class EventsController {

    private final List<SseEmitter> events = new CopyOnWriteArrayList<>();
    private final List<SseEmitter> notifications = new CopyOnWriteArrayList<>();
    private final List<SseEmitter> broadcast = new CopyOnWriteArrayList<>();

    private final ExecutorService executor = Executors.newCachedThreadPool();

    record Event(long n, double time) {}

    record Message(String text, double time) {}

    /** A numbered event each second, on from the one that the client had last. */
    @GetMapping("/events")
    public SseEmitter events(@RequestHeader(name = "Last-Event-ID", defaultValue = "0") long last) {
        SseEmitter emitter = open(events);
        executor.execute(() -> {
            try {
                for (long n = last + 1; ; n++) {
                    emitter.send(SseEmitter.event().id(Long.toString(n)).data(new Event(n, now())));
                    Thread.sleep(1000);
                }
            } catch (Exception e) {
                emitter.completeWithError(e);
            }
        });
        return emitter;
    }

    /** Named events: the unread notifications, then a reminder every half minute. */
    @GetMapping("/notifications")
    public SseEmitter notifications() {
        SseEmitter emitter = open(notifications);
        executor.execute(() -> {
            try {
                for (String kind : List.of("info", "warning", "alert")) {
                    emitter.send(SseEmitter.event().name(kind).data(new Message("an unread " + kind, now())));
                }
                while (true) {
                    Thread.sleep(30_000);
                    emitter.send(SseEmitter.event().name("reminder").data(new Message("three are unread", now())));
                }
            } catch (Exception e) {
                emitter.completeWithError(e);
            }
        });
        return emitter;
    }

    /** What anybody posts to /publish. */
    @GetMapping("/broadcast")
    public SseEmitter broadcast() {
        return open(broadcast);
    }

    @PostMapping("/publish")
    public Map<String, Integer> publish(@RequestBody Map<String, String> body) {
        Message message = new Message(body.get("text"), now());
        int sent = 0;
        for (SseEmitter emitter : broadcast) {
            try {
                emitter.send(SseEmitter.event().name("broadcast").data(message));
                sent++;
            } catch (IOException e) {
                broadcast.remove(emitter);
            }
        }
        return Map.of("sent", sent);
    }

    @GetMapping("/clients")
    public Map<String, Integer> clients() {
        return Map.of(
                "events", events.size(),
                "notifications", notifications.size(),
                "broadcast", broadcast.size());
    }

    private SseEmitter open(List<SseEmitter> emitters) {
        SseEmitter emitter = new SseEmitter(Long.MAX_VALUE);
        emitters.add(emitter);
        emitter.onCompletion(() -> emitters.remove(emitter));
        emitter.onTimeout(() -> emitters.remove(emitter));
        emitter.onError(e -> emitters.remove(emitter));
        return emitter;
    }

    private static double now() {
        return System.currentTimeMillis() / 1000.0;
    }
}
