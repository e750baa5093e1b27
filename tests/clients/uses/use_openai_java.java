// Uses openai for Java: whole, streamed through its accumulator, a class as schema, a tool that is called, responses, an error.

import com.openai.client.OpenAIClient;
import com.openai.client.okhttp.OpenAIOkHttpClient;
import com.openai.core.JsonValue;
import com.openai.core.http.StreamResponse;
import com.openai.errors.BadRequestException;
import com.openai.helpers.ChatCompletionAccumulator;
import com.openai.models.FunctionDefinition;
import com.openai.models.FunctionParameters;
import com.openai.models.chat.completions.ChatCompletion;
import com.openai.models.chat.completions.ChatCompletionChunk;
import com.openai.models.chat.completions.ChatCompletionCreateParams;
import com.openai.models.chat.completions.ChatCompletionFunctionTool;
import com.openai.models.chat.completions.ChatCompletionNamedToolChoice;
import com.openai.models.responses.ResponseCreateParams;
import java.util.List;
import java.util.Map;

class UseOpenai {
  public enum City {
    Paris,
    Rome
  }

  public static class Capital {
    public City city;
  }

  static void check(boolean holds, Object what) {
    if (!holds) throw new AssertionError(what);
  }

  static ChatCompletionCreateParams.Builder ask(String question, long maxTokens) {
    return ChatCompletionCreateParams.builder()
        .model("smollm2")
        .addUserMessage(question)
        .maxTokens(maxTokens)
        .temperature(0);
  }

  static void wholeAndStreamed(OpenAIClient client) {
    ChatCompletionCreateParams params = ask("What is the capital of France?", 8).build();
    ChatCompletion whole = client.chat().completions().create(params);
    String text = whole.choices().get(0).message().content().orElseThrow();
    check(!text.isBlank() && whole.usage().orElseThrow().completionTokens() >= 1, whole);
    ChatCompletionAccumulator accumulator = ChatCompletionAccumulator.create();
    try (StreamResponse<ChatCompletionChunk> stream = client.chat().completions().createStreaming(params)) {
      stream.stream().forEach(accumulator::accumulate);
    }
    String streamed = accumulator.chatCompletion().choices().get(0).message().content().orElseThrow();
    check(streamed.equals(text), streamed + " is not " + text);
  }

  static void schema(OpenAIClient client) {
    Capital capital =
        client
            .chat()
            .completions()
            .create(ask("The capital of France is Paris.", 128).responseFormat(Capital.class).build())
            .choices()
            .get(0)
            .message()
            .content()
            .orElseThrow();
    check(capital.city != null, "no city");
  }

  static void tool(OpenAIClient client) {
    Map<String, Object> city = Map.of("city", Map.of("enum", List.of("Paris", "Rome")));
    FunctionParameters parameters =
        FunctionParameters.builder()
            .putAdditionalProperty("type", JsonValue.from("object"))
            .putAdditionalProperty("properties", JsonValue.from(city))
            .putAdditionalProperty("required", JsonValue.from(List.of("city")))
            .build();
    FunctionDefinition weather =
        FunctionDefinition.builder()
            .name("weather")
            .description("Tell the weather of a city.")
            .parameters(parameters)
            .build();
    ChatCompletion answer =
        client
            .chat()
            .completions()
            .create(
                ask("What is the weather in Paris?", 128)
                    .addTool(ChatCompletionFunctionTool.builder().function(weather).build())
                    .toolChoice(
                        ChatCompletionNamedToolChoice.builder()
                            .function(ChatCompletionNamedToolChoice.Function.builder().name("weather").build())
                            .build())
                    .build());
    var calls = answer.choices().get(0).message().toolCalls().orElseThrow();
    check(calls.size() == 1, calls);
    var function = calls.get(0).asFunction().function();
    check(function.name().equals("weather"), function);
    check(function.arguments().matches("\\{\\s*\"city\"\\s*:\\s*\"(Paris|Rome)\"\\s*\\}"), function);
  }

  static void respond(OpenAIClient client) {
    var answer =
        client
            .responses()
            .create(
                ResponseCreateParams.builder()
                    .model("smollm2")
                    .input("What is the capital of France?")
                    .maxOutputTokens(16)
                    .temperature(0)
                    .build());
    String text =
        answer.output().stream()
            .flatMap(item -> item.message().stream())
            .flatMap(message -> message.content().stream())
            .flatMap(content -> content.outputText().stream())
            .map(part -> part.text())
            .reduce("", String::concat);
    check(!text.isBlank(), answer);
  }

  static void anErrorNamesTheField(OpenAIClient client) {
    try {
      client.chat().completions().create(ask("Hi.", 8).temperature(3).build());
    } catch (BadRequestException error) {
      check(error.param().orElseThrow().equals("temperature"), error);
      return;
    }
    throw new AssertionError("temperature 3 is not refused");
  }

  public static void main(String[] arguments) {
    OpenAIClient client =
        OpenAIOkHttpClient.builder().baseUrl(arguments[0] + "/v1").apiKey("none").maxRetries(0).build();
    check(client.models().list().data().get(0).id().equals("smollm2"), "models");
    wholeAndStreamed(client);
    schema(client);
    tool(client);
    respond(client);
    anErrorNamesTheField(client);
    System.exit(0); // idle threads of the HTTP client would keep the program for a minute
  }
}
